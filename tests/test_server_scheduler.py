"""The scheduler alone, in milliseconds: rows, turns, budgets."""

import numpy as np

from server.messages import Generate, Sampling, Score
from server.scheduler import Move, Scheduler
from server.sequence import Phase, Sequence

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


def prompt(name, length):
    return Sequence(Generate(name, np.zeros(length, "<i4").tobytes(), GREEDY, 9, ()), submitted=0.0)


def document(name, length):
    return Sequence(Score(name, np.zeros(length, "<i4").tobytes()), submitted=0.0)


def scheduler(**changes):
    return Scheduler(**{"num_rows": 3, "chunk_tokens": 10, "budget_tokens": 15} | changes)


def ids(plan):
    return [(reading.sequence.id, reading.size) for reading in plan.reading]


def step(scheduler):
    plan = scheduler.plan()
    scheduler.commit(plan)
    return plan


def test_rows_are_given_in_order_of_arrival_lowest_first():
    own = scheduler(num_rows=2)
    sequences = [prompt(name, 1) for name in "abc"]
    for sequence in sequences:
        own.add(sequence)
    assert step(own).admitted == (sequences[0], sequences[1])
    assert [sequence.row for sequence in sequences] == [0, 1, -1]
    own.release(sequences[0])
    assert step(own).admitted == (sequences[2],)
    assert sequences[2].row == 0


def test_a_step_reads_no_more_than_its_budget_in_chunks_and_in_turns():
    own = scheduler()
    for name in "abc":
        own.add(prompt(name, 25))
    assert ids(step(own)) == [("a", 10), ("b", 5)]
    assert ids(step(own)) == [("c", 10), ("a", 5)]
    assert ids(step(own)) == [("b", 10), ("c", 5)]


def test_a_sequence_decodes_from_the_step_after_its_last_chunk():
    own = scheduler()
    sequence = prompt("a", 12)
    own.add(sequence)
    assert step(own).decoding == ()
    assert sequence.phase is Phase.READING
    assert step(own).decoding == ()
    assert sequence.phase is Phase.DECODING
    assert step(own).decoding == (sequence,)


def test_a_document_reads_all_but_its_last_token():
    sequence = document("a", 12)
    assert sequence.num_to_read == 11
    sequence.row = 0
    chunk = sequence.next_chunk(11)
    assert len(chunk.tokens) == len(chunk.targets) == 11


def test_the_highest_row_moves_into_the_gap_below_it():
    own = scheduler()
    sequences = [prompt(name, 1) for name in "abc"]
    for sequence in sequences:
        own.add(sequence)
    step(own)
    own.release(sequences[0])
    assert step(own).moves == (Move(2, 0),)
    assert sequences[2].row == 0
    own.release(sequences[1])
    assert step(own).moves == ()
    own.release(sequences[2])
    assert not own.has_work


def test_a_waiting_sequence_can_leave_the_queue():
    own = scheduler(num_rows=1)
    first, second = prompt("a", 1), prompt("b", 1)
    own.add(first)
    own.add(second)
    step(own)
    own.release(second)
    assert second.phase is Phase.ENDED
    own.release(first)
    assert not own.has_work

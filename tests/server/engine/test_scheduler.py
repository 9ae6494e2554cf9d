"""Tests of the scheduler alone, in milliseconds: rows, turns, budgets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.sampling.params import SamplingParams
from server.engine.scheduler import Move, Scheduler
from server.engine.sequence import Phase, Sequence
from server.protocol.messages import Generate, Score


def prompt(name, length):
    return Sequence(Generate(name, np.zeros(length, "<i4").tobytes(), SamplingParams(), 9), submitted=0.0)


def document(name, length, *, num_shared=0):
    return Sequence(Score(name, np.zeros(length, "<i4").tobytes(), num_shared), submitted=0.0)


def scheduler(**changes):
    return Scheduler(**{"num_rows": 3, "chunk_tokens": 10} | changes)


def ids(plan):
    return [(reading.sequence.id, reading.size) for reading in plan.reading]


def step(scheduler, *, budget_tokens=25):
    plan = scheduler.plan(budget_tokens)
    for reading in plan.reading:
        scheduler.commit(reading)
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


def test_who_comes_first_is_admitted_before_all_who_wait():
    own = scheduler(num_rows=1)
    late, early = prompt("late", 1), prompt("early", 1)
    own.add(late)
    own.add_first(early)
    assert step(own).admitted == (early,)


def test_a_step_reads_whole_chunks_in_turns_and_no_more_than_its_budget():
    own = scheduler()
    for name in "abc":
        own.add(prompt(name, 25))
    assert ids(step(own)) == [("a", 10), ("b", 10)]
    assert ids(step(own)) == [("c", 10), ("a", 10)]
    assert ids(step(own)) == [("b", 10), ("c", 10), ("a", 5)]


def test_a_step_reads_one_chunk_even_without_a_budget():
    own = scheduler()
    own.add(prompt("a", 25))
    own.add(prompt("b", 25))
    assert ids(step(own, budget_tokens=0)) == [("a", 10)]
    assert ids(step(own, budget_tokens=0)) == [("b", 10)]


def test_a_document_is_cut_where_its_forks_part():
    own = scheduler()
    own.add(document("a", 30, num_shared=13))
    sizes = [ids(step(own))[0][1] for _ in range(4)]
    assert sizes == [10, 3, 10, 6]


def test_a_sequence_decodes_from_the_step_after_its_last_chunk():
    own = scheduler()
    sequence = prompt("a", 12)
    own.add(sequence)
    assert step(own).decoding == ()
    assert sequence.phase is Phase.READING
    assert step(own).decoding == ()
    assert sequence.phase is Phase.DECODING
    assert step(own).decoding == (sequence,)


def test_who_has_nothing_to_read_decodes_at_once():
    own = scheduler()
    sequence = prompt("a", 12)
    sequence.num_read = 12
    own.add_first(sequence)
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


def test_a_row_that_is_lost_is_noticed_when_nobody_lives():
    own = scheduler()
    own.check_idle()
    own.add(prompt("a", 1))
    step(own)
    with pytest.raises(RuntimeError, match="1 rows are taken"):
        own.check_idle()


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    num_rows=st.integers(1, 5),
    chunk=st.integers(1, 12),
    budgets=st.lists(st.integers(0, 50), min_size=1),
)
def test_every_prompt_is_read_in_chunks_that_depend_on_nothing_but_itself(lengths, num_rows, chunk, budgets):
    """Whatever the other prompts and the budget are, all chunks of a prompt but the last have the full size."""
    own = scheduler(num_rows=num_rows, chunk_tokens=chunk)
    for name, length in enumerate(lengths):
        own.add(prompt(str(name), length))
    seen = {str(name): [] for name in range(len(lengths))}
    for number in range(10_000):
        if not own.has_work:
            break
        plan = step(own, budget_tokens=budgets[number % len(budgets)])
        for reading in plan.reading:
            seen[reading.sequence.id].append(reading.size)
        assert sum(reading.size for reading in plan.reading) <= max(budgets[number % len(budgets)], chunk)
        for sequence in plan.decoding:
            own.release(sequence)
    own.check_idle()
    for name, length in enumerate(lengths):
        whole, rest = divmod(length, chunk)
        assert seen[str(name)] == [chunk] * whole + [rest] * (rest > 0)

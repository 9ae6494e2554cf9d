"""The engine over a fake runner: each row is fed its own tokens in order, and every sequence ends exactly once."""

import numpy as np
import pytest
from fake_runner import NOT_A_NUMBER_TOKEN, RAISE_TOKEN, FakeRunner, next_token
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine import Engine
from server.messages import Generate, Sampling, Score, Step

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


def packed(tokens):
    return np.asarray(tokens, dtype="<i4").tobytes()


def generate(name, tokens, *, max_new_tokens=5, stop_token_ids=()):
    return Generate(name, packed(tokens), GREEDY, max_new_tokens, tuple(stop_token_ids))


def continuation(tokens, length):
    history = list(tokens)
    for _ in range(length):
        history.append(next_token(history))
    return history[len(tokens) :]


class Log:
    """All that an engine said, sorted by sequence."""

    def __init__(self):
        self.tokens, self.scores, self.ended = {}, {}, {}

    def add(self, step: Step):
        for token in step.tokens:
            assert token.sequence not in self.ended
            self.tokens.setdefault(token.sequence, []).append(token.token)
        for scores in step.scores:
            assert scores.sequence not in self.ended
            self.scores.setdefault(scores.sequence, []).extend(np.frombuffer(scores.logprobs, "<f4").tolist())
        for ended in step.ended:
            assert ended.sequence not in self.ended, "ended twice"
            self.ended[ended.sequence] = ended

    def drain(self, engine):
        for _ in range(10_000):
            if not engine.has_work:
                return self
            self.add(engine.step())
        raise AssertionError("the engine never comes to rest")


def test_a_prompt_is_continued_to_its_length():
    engine = Engine(FakeRunner())
    engine.submit(generate("a", [1, 2, 3], max_new_tokens=7))
    log = Log().drain(engine)
    assert log.tokens["a"] == continuation([1, 2, 3], 7)
    assert log.ended["a"].finish_reason == "length"


def test_a_stop_token_ends_a_sequence_and_is_said():
    engine = Engine(FakeRunner())
    expected = continuation([1, 2, 3], 3)
    engine.submit(generate("a", [1, 2, 3], max_new_tokens=50, stop_token_ids=[expected[2]]))
    log = Log().drain(engine)
    assert log.tokens["a"] == expected
    assert log.ended["a"].finish_reason == "eos_token"


def test_a_document_is_scored_whole_and_one_of_a_single_token_has_no_scores():
    engine = Engine(FakeRunner(), chunk_tokens=4)
    engine.submit(Score("long", packed(range(100, 130))))
    engine.submit(Score("single", packed([7])))
    log = Log().drain(engine)
    assert log.scores["long"] == [-n / 8 for n in range(1, 30)]
    assert log.ended["long"].finish_reason == log.ended["single"].finish_reason == "scored"
    assert "single" not in log.scores


def test_a_long_prompt_does_not_stall_those_that_generate():
    runner = FakeRunner()
    engine = Engine(runner, chunk_tokens=8, budget_tokens=8)
    engine.submit(generate("fast", [1], max_new_tokens=30))
    engine.step()
    engine.submit(Score("slow", packed([9] * 200)))
    for _ in range(20):
        step = engine.step()
        assert step.num_decoded == 1
        assert step.num_prefilled <= 8


def test_a_short_prompt_behind_a_long_document_is_read_in_turn():
    engine = Engine(FakeRunner(), chunk_tokens=8, budget_tokens=8)
    engine.submit(Score("slow", packed([9] * 400)))
    engine.submit(generate("short", [1, 2, 3], max_new_tokens=1))
    log = Log()
    for _ in range(3):
        log.add(engine.step())
    assert log.ended["short"].finish_reason == "length"


def test_a_row_without_a_number_fails_alone():
    engine = Engine(FakeRunner())
    engine.submit(generate("good", [1, 2]))
    engine.submit(generate("bad", [1, NOT_A_NUMBER_TOKEN]))
    engine.submit(Score("document", packed([1, NOT_A_NUMBER_TOKEN, 5])))
    log = Log().drain(engine)
    assert log.tokens["good"] == continuation([1, 2], 5)
    assert log.ended["bad"].finish_reason == log.ended["document"].finish_reason == "error"
    assert "not a number" in log.ended["bad"].error


def test_a_failure_of_the_runner_is_not_swallowed():
    engine = Engine(FakeRunner())
    engine.submit(generate("a", [RAISE_TOKEN]))
    with pytest.raises(RuntimeError, match="fake device"):
        engine.step()


def test_shutdown_ends_everything_once():
    engine = Engine(FakeRunner(2))
    for name in "abcd":
        engine.submit(generate(name, [1, 2], max_new_tokens=50))
    log = Log()
    log.add(engine.step())
    log.add(engine.shutdown())
    assert {ended.finish_reason for ended in log.ended.values()} == {"shutdown"}
    assert set(log.ended) == set("abcd")
    assert not engine.has_work


def test_timings_tell_queue_prompt_and_decoding_apart():
    times = iter(range(1000))
    engine = Engine(FakeRunner(1), clock=lambda: float(next(times)))
    engine.submit(generate("a", [1, 2]))
    engine.submit(generate("b", [1, 2]))
    log = Log().drain(engine)
    for name in "ab":
        timings = log.ended[name].timings
        assert timings.queue_ms > 0
        assert timings.prefill_ms > 0
        assert timings.decode_ms > 0
    assert log.ended["b"].timings.queue_ms > log.ended["a"].timings.queue_ms


def test_idle_high_rows_are_not_decoded():
    runner = FakeRunner(8)
    engine = Engine(runner)
    for number in range(7):
        engine.submit(generate(str(number), [number + 1], max_new_tokens=3))
    engine.submit(generate("last", [9], max_new_tokens=40))
    log = Log().drain(engine)
    assert log.tokens["last"] == continuation([9], 40)
    assert runner.calls[-30:] == [("decode", 1)] * 30


action = st.one_of(
    st.tuples(st.just("generate"), st.lists(st.integers(20, 219), min_size=1, max_size=40), st.integers(1, 20)),
    st.tuples(st.just("score"), st.lists(st.integers(20, 219), min_size=1, max_size=60)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("step"), st.integers(1, 6)),
)


@settings(max_examples=150, deadline=None)
@given(actions=st.lists(action, max_size=40), num_rows=st.integers(1, 5), chunk=st.integers(1, 9))
def test_whatever_happens_every_sequence_ends_once_and_reads_only_its_own_tokens(actions, num_rows, chunk):
    runner = FakeRunner(num_rows)
    engine = Engine(runner, chunk_tokens=chunk, budget_tokens=2 * chunk)
    log, asked = Log(), {}
    for number, (kind, *details) in enumerate(actions):
        name = str(number)
        if kind == "generate":
            asked[name] = details
            engine.submit(generate(name, details[0], max_new_tokens=details[1]))
        elif kind == "score":
            asked[name] = details
            engine.submit(Score(name, packed(details[0])))
        elif kind == "cancel":
            engine.cancel(str(details[0]))
        else:
            for _ in range(details[0]):
                log.add(engine.step())
    log.drain(engine)
    assert set(log.ended) == set(asked)
    for name, (tokens, *length) in asked.items():
        cancelled = log.ended[name].finish_reason == "cancelled"
        if length:
            expected, found = continuation(tokens, length[0]), log.tokens.get(name, [])
        else:
            expected, found = [-n / 8 for n in range(1, len(tokens))], log.scores.get(name, [])
        assert found == (expected[: len(found)] if cancelled else expected)

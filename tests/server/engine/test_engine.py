"""Tests of the engine over a fake runner: each row reads its own tokens in order; every sequence ends exactly once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling.params import SamplingParams
from server.config import EngineOptions
from server.engine.engine import Engine
from server.protocol.messages import Extras, Generate, Score, Step
from tests.support.fake_runner import (
    NOT_A_NUMBER_TOKEN,
    OUT_OF_MEMORY_TOKEN,
    RAISE_ALL_TOKEN,
    RAISE_TOKEN,
    FakeRunner,
    next_token,
)

DEFAULTS = EngineOptions()


def packed(tokens):
    return np.asarray(tokens, dtype="<i4").tobytes()


def generate(name, tokens, *, max_new_tokens=5, end_ids=(), **options):
    return Generate(name, packed(tokens), SamplingParams(end_ids=tuple(end_ids)), max_new_tokens, **options)


def continuation(tokens, length):
    history = list(tokens)
    for _ in range(length):
        history.append(next_token(history))
    return history[len(tokens) :]


class Log:
    """All results of an engine's steps, sorted by sequence."""

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
    engine = Engine(FakeRunner(), DEFAULTS)
    engine.submit(generate("a", [1, 2, 3], max_new_tokens=7))
    log = Log().drain(engine)
    assert log.tokens["a"] == continuation([1, 2, 3], 7)
    assert log.ended["a"].finish_reason == "length"


def test_a_stop_token_ends_a_sequence_and_is_said():
    engine = Engine(FakeRunner(), DEFAULTS)
    expected = continuation([1, 2, 3], 3)
    engine.submit(generate("a", [1, 2, 3], max_new_tokens=50, end_ids=[expected[2]]))
    log = Log().drain(engine)
    assert log.tokens["a"] == expected
    assert log.ended["a"].finish_reason == "eos_token"


def test_a_document_is_scored_whole_and_one_of_a_single_token_has_no_scores():
    engine = Engine(FakeRunner(), EngineOptions(chunk_tokens=4))
    engine.submit(Score("long", packed(range(100, 130))))
    engine.submit(Score("single", packed([7])))
    log = Log().drain(engine)
    assert log.scores["long"] == [-n / 8 for n in range(1, 30)]
    assert log.ended["long"].finish_reason == log.ended["single"].finish_reason == "scored"
    assert "single" not in log.scores


def test_a_long_prompt_does_not_stall_those_that_generate():
    runner = FakeRunner()
    engine = Engine(runner, EngineOptions(chunk_tokens=8, budget_tokens=8))
    engine.submit(generate("fast", [1], max_new_tokens=30))
    engine.step()
    engine.submit(Score("slow", packed([9] * 200)))
    for _ in range(20):
        step = engine.step()
        assert step.num_decoded == 1
        assert step.num_prefilled <= 8


def test_a_short_prompt_behind_a_long_document_is_read_in_turn():
    engine = Engine(FakeRunner(), EngineOptions(chunk_tokens=8, budget_tokens=8))
    engine.submit(Score("slow", packed([9] * 400)))
    engine.submit(generate("short", [1, 2, 3], max_new_tokens=1))
    log = Log()
    for _ in range(3):
        log.add(engine.step())
    assert log.ended["short"].finish_reason == "length"


def test_a_row_without_a_number_fails_alone():
    engine = Engine(FakeRunner(), DEFAULTS)
    engine.submit(generate("good", [1, 2]))
    engine.submit(generate("bad", [1, NOT_A_NUMBER_TOKEN]))
    engine.submit(Score("document", packed([1, NOT_A_NUMBER_TOKEN, 5])))
    log = Log().drain(engine)
    assert log.tokens["good"] == continuation([1, 2], 5)
    assert log.ended["bad"].finish_reason == log.ended["document"].finish_reason == "error"
    assert "not a number" in log.ended["bad"].error


@pytest.mark.parametrize(
    ("token", "error"), [(RAISE_TOKEN, "RuntimeError"), (OUT_OF_MEMORY_TOKEN, "MemoryError: the fake device has no")]
)
def test_a_row_that_fails_ends_alone(token, error):
    engine = Engine(FakeRunner(), EngineOptions(chunk_tokens=4))
    engine.submit(generate("good", [1, 2], max_new_tokens=30))
    engine.submit(generate("bad", [1, 2, 3, 4, token]))
    engine.submit(Score("document", packed([1, 2, 3, token, 5])))
    log = Log().drain(engine)
    assert log.tokens["good"] == continuation([1, 2], 30)
    assert log.ended["bad"].finish_reason == log.ended["document"].finish_reason == "error"
    assert error in log.ended["bad"].error


def test_a_failure_of_one_rows_decoding_ends_that_row_alone():
    class Fragile(FakeRunner):
        def decode(self, rows, tokens, draws):
            if any(draw.num_generated == 3 and draw.sampling.seed == 1 for draw in draws):
                raise RuntimeError("this one")
            return super().decode(rows, tokens, draws)

    engine = Engine(Fragile(), DEFAULTS)
    for name in range(3):
        engine.submit(Generate(str(name), packed([name + 1]), SamplingParams(seed=name), 10))
    log = Log().drain(engine)
    assert [log.ended[name].finish_reason for name in "012"] == ["length", "error", "length"]
    assert log.tokens["0"] == continuation([1], 10)
    assert log.tokens["1"] == continuation([2], 3)


@pytest.mark.parametrize("others", [0, 2])
def test_a_device_that_fails_ends_the_engine(others):
    engine = Engine(FakeRunner(), DEFAULTS)
    for name in range(others):
        engine.submit(generate(str(name), [1], max_new_tokens=50))
    engine.submit(generate("a", [RAISE_ALL_TOKEN]))
    with pytest.raises(RuntimeError, match="is broken"):
        engine.step()


def test_what_is_late_ends_with_what_it_has():
    now = 0.0
    engine = Engine(FakeRunner(1), DEFAULTS, clock=lambda: now)
    engine.submit(generate("runs", [1], max_new_tokens=50, timeout_s=2.0))
    engine.submit(generate("waits", [1], timeout_s=1.0))
    engine.submit(generate("patient", [1]))
    log = Log()
    log.add(engine.step())
    now = 1.5
    log.add(engine.step())
    assert log.ended["waits"].finish_reason == "timeout"
    now = 2.5
    log.drain(engine)
    assert log.ended["runs"].finish_reason == "timeout"
    assert log.tokens["runs"] == continuation([1], 2)
    assert log.ended["patient"].finish_reason == "length"


def test_deadlines_of_what_has_ended_are_forgotten():
    engine = Engine(FakeRunner(), DEFAULTS)
    for name in range(1000):
        engine.submit(generate(str(name), [1], max_new_tokens=1, timeout_s=1e6))
        Log().drain(engine)
    assert len(engine._deadlines) < 100


def test_reading_takes_no_longer_than_the_generating_can_bear():
    """Each token read takes 1 ms here: in a budget of 10 ms, a step reads 10 of the 64 tokens that it may read."""
    now = 0.0

    class Slow(FakeRunner):
        def extend(self, chunks):
            nonlocal now
            now += sum(len(chunk.tokens) for chunk in chunks) / 1000
            return super().extend(chunks)

    engine = Engine(Slow(), EngineOptions(chunk_tokens=2, budget_tokens=64, prefill_ms=10), clock=lambda: now)
    engine.submit(generate("fast", [1], max_new_tokens=200))
    engine.step()
    for name in range(3):
        engine.submit(Score(str(name), packed([9] * 300)))
    sizes = [engine.step().num_prefilled for _ in range(20)]
    assert max(sizes) == 6  # three rows, each with one chunk: a row reads at most one chunk in a step
    engine = Engine(Slow(8), EngineOptions(chunk_tokens=2, budget_tokens=64, prefill_ms=5), clock=lambda: now)
    engine.submit(generate("fast", [1], max_new_tokens=200))
    engine.step()
    for name in range(7):
        engine.submit(Score(str(name), packed([9] * 300)))
    assert {engine.step().num_prefilled for _ in range(20)} == {4}


# forks


def test_forks_read_their_prompt_once_and_continue_it_each_in_its_own_way():
    runner = FakeRunner(2)
    engine = Engine(runner, EngineOptions(chunk_tokens=4))
    sampling = SamplingParams(temperature=1.0, seed=1)
    forks = (("b", 2), ("c", 3), ("d", 4))
    engine.submit(Generate("a", packed(range(20, 30)), sampling, 6, forks=forks))
    log = Log().drain(engine)
    assert sum(size for kind, size in runner.calls if kind == "extend") == 10
    for name, seed in (("a", 1), *forks):
        alone = Engine(FakeRunner(1), DEFAULTS)
        alone.submit(Generate("alone", packed(range(20, 30)), SamplingParams(temperature=1.0, seed=seed), 6))
        assert log.tokens[name] == Log().drain(alone).tokens["alone"]
        assert log.ended[name].finish_reason == "length"


@pytest.mark.parametrize("num_shared", [0, 1, 5, 9])
def test_continuations_are_scored_from_one_reading_of_their_context(num_shared):
    runner = FakeRunner(2)
    engine = Engine(runner, EngineOptions(chunk_tokens=4))
    context, tails = list(range(20, 21 + num_shared)), [[50, 51], [60], [70, 71, 72, 73, 74, 75]]
    forks = tuple((name, packed([context[-1], *tail])) for name, tail in zip("bc", tails[1:], strict=True))
    engine.submit(Score("a", packed(context + tails[0]), num_shared, forks=forks))
    log = Log().drain(engine)
    for name, tail in zip("abc", tails, strict=True):
        assert log.scores[name] == [-(len(context) + i) / 8 for i in range(len(tail))]
        assert log.ended[name].finish_reason == "scored"
    read = sum(size for kind, size in runner.calls if kind == "extend")
    assert read == num_shared + sum(map(len, tails))


def test_prompt_scores_come_before_the_first_token():
    engine = Engine(FakeRunner(), EngineOptions(chunk_tokens=4))
    engine.submit(generate("a", range(20, 30), prompt_extras=Extras()))
    engine.submit(generate("single", [20], prompt_extras=Extras()))
    log = Log().drain(engine)
    assert log.scores["a"] == [-n / 8 for n in range(1, 10)]
    assert "single" not in log.scores
    assert log.tokens["a"] == continuation(range(20, 30), 5)


@pytest.mark.parametrize("when", [0, 1, 3])
@pytest.mark.parametrize("who", ["a", "b"])
def test_a_cancelled_member_leaves_no_row_behind(who, when):
    engine = Engine(FakeRunner(1), EngineOptions(chunk_tokens=4))
    sampling = SamplingParams(temperature=1.0, seed=1)
    engine.submit(Generate("a", packed(range(20, 28)), sampling, 6, forks=(("b", 2), ("c", 3))))
    log = Log()
    for _ in range(when):
        log.add(engine.step())
    engine.cancel(who)
    log.drain(engine)
    assert set(log.ended) == set("abc")
    assert log.ended[who].finish_reason == "cancelled"


def test_shutdown_ends_everything_once():
    engine = Engine(FakeRunner(2), DEFAULTS)
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
    engine = Engine(FakeRunner(1), DEFAULTS, clock=lambda: float(next(times)))
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
    engine = Engine(runner, DEFAULTS)
    for number in range(7):
        engine.submit(generate(str(number), [number + 1], max_new_tokens=3))
    engine.submit(generate("last", [9], max_new_tokens=40))
    log = Log().drain(engine)
    assert log.tokens["last"] == continuation([9], 40)
    assert runner.calls[-30:] == [("decode", 1)] * 30


action = st.one_of(
    st.tuples(st.just("generate"), st.lists(st.integers(20, 219), min_size=1, max_size=40), st.integers(1, 20)),
    st.tuples(st.just("forks"), st.lists(st.integers(20, 219), min_size=1, max_size=40), st.integers(1, 20)),
    st.tuples(st.just("score"), st.lists(st.integers(20, 219), min_size=1, max_size=60)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("step"), st.integers(1, 6)),
)


@settings(max_examples=150, deadline=None)
@given(actions=st.lists(action, max_size=40), num_rows=st.integers(1, 5), chunk=st.integers(1, 9))
def test_whatever_happens_every_sequence_ends_once_and_reads_only_its_own_tokens(actions, num_rows, chunk):
    runner = FakeRunner(num_rows)
    engine = Engine(runner, EngineOptions(chunk_tokens=chunk, budget_tokens=2 * chunk))
    log, asked = Log(), {}
    for number, (kind, *details) in enumerate(actions):
        name = str(number)
        if kind == "generate":
            asked[name] = details
            engine.submit(generate(name, details[0], max_new_tokens=details[1]))
        elif kind == "forks":
            forks = tuple((f"{name}.{i}", i) for i in range(3))
            asked |= dict.fromkeys((name, *(fork for fork, _ in forks)), details)
            engine.submit(generate(name, details[0], max_new_tokens=details[1], forks=forks))
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


def test_the_row_of_a_cancelled_sequence_serves_the_next_one_in_the_next_step():
    engine = Engine(FakeRunner(1), DEFAULTS)
    engine.submit(generate("a", [1], max_new_tokens=500))
    engine.submit(generate("b", [1], max_new_tokens=1))
    log = Log()
    for _ in range(5):
        log.add(engine.step())
    engine.cancel("a")
    log.add(engine.step())
    assert log.ended["a"].finish_reason == "cancelled"
    assert log.ended["b"].finish_reason == "length"

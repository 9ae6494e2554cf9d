"""Tests of the link with a real engine process over a fake runner: which messages arrive, and in which stream."""

from collections.abc import Iterator

import numpy as np
import pytest

from model.sampling.params import SamplingParams
from server.protocol.messages import Ended, Extras, Generate, Scores, Step, Token
from tests.support.fake_runner import RAISE_TOKEN, next_token
from tests.support.link_harness import collect, ending, generate, left_empty, packed, running, score
from tests.support.odd_runner import SHARES_PER_TOKEN

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with left_empty(monkeypatch):
        yield


async def test_a_stream_holds_the_tokens_in_order_and_then_one_ending():
    async with running() as link:
        messages = await collect(generate(link, "a", [1, 2, 3], max_new_tokens=5))
    history = [1, 2, 3]
    for message in messages[:-1]:
        assert isinstance(message, Token)
        assert message.token == next_token(history)
        history.append(message.token)
    assert len(history) == 8
    assert messages[-1].finish_reason == "length"


async def test_the_scores_of_a_prompt_come_before_its_first_token():
    async with running() as link:
        asked = Generate("a", packed([1, 2, 3]), SamplingParams(), 2, prompt_extras=Extras())
        (stream,) = link.submit(asked)
        said = []
        while not said or not isinstance(said[-1], Ended):
            said += await stream.take()
    assert [type(message) for message in said] == [Scores, Token, Token, Ended]


async def test_forks_of_a_message_have_streams_of_their_own():
    async with running() as link:
        request = Generate("a", packed([1, 2]), SamplingParams(), 3, forks=(("b", 1), ("c", 2)))
        streams = link.submit(request)
        assert len(streams) == 3
        for name, stream in zip("abc", streams, strict=True):
            messages = await collect(stream)
            assert {message.sequence for message in messages} == {name}
            assert len(messages) == 4


async def test_a_document_longer_than_a_chunk_arrives_whole():
    async with running() as link:
        messages = await collect(score(link, "a", [7] * 1000))
    parts = [message for message in messages if isinstance(message, Scores)]
    logprobs = np.concatenate([np.frombuffer(part.logprobs, "<f4") for part in parts])
    assert len(parts) > 1
    assert logprobs.tolist() == [-n / 8 for n in range(1, 1000)]
    assert messages[-1].finish_reason == "scored"


async def test_messages_larger_than_the_buffers_of_the_socket_pass_both_ways():
    settings = {"chunk_tokens": 1 << 20, "budget_tokens": 1 << 20, "heartbeat_timeout_s": 60}
    async with running(runner="tests.support.odd_runner:TalkativeRunner.load", **settings) as link:
        prompt = [1, 2] * 1_500_000  # 12 MB
        token, _ = await collect(generate(link, "a", prompt, max_new_tokens=1))
        assert token.token == next_token(prompt)
        scores, _ = await collect(score(link, "b", [7] * 5))
        assert scores.memory_shares == np.ones(4 * SHARES_PER_TOKEN, np.float32).tobytes()  # 16 MB


async def test_a_cancelled_sequence_ends_and_its_row_is_free():
    async with running(num_rows=1) as link:
        first, second = generate(link, "a", [1]), generate(link, "b", [2], max_new_tokens=3)
        await anext(first)
        link.cancel("a")
        assert (await ending(first)).finish_reason == "cancelled"
        assert (await ending(second)).finish_reason == "length"
        link.cancel("a")  # the sequence ended long ago
        assert (link.rows_used, link.num_waiting, link.state) == (0, 0, "ready")


async def test_a_flood_of_cancelled_requests_leaves_nothing_behind():
    async with running() as link:
        streams = [generate(link, str(i), [1, 2]) for i in range(1000)]
        for i in range(1000):
            link.cancel(str(i))
        assert {(await ending(stream)).finish_reason for stream in streams} == {"cancelled"}
        assert (await ending(generate(link, "0", [1], max_new_tokens=2))).finish_reason == "length"  # the name is free
        assert (link.rows_used, link.num_waiting, link.tokens_waiting) == (0, 0, 0)


async def test_each_step_is_told_to_whoever_counts_them():
    steps: list[Step] = []
    async with running() as link:
        link.on_step = steps.append
        await ending(generate(link, "a", [1, 2, 3], max_new_tokens=4))
    assert sum(step.num_prefilled for step in steps) == 3
    assert sum(step.num_decoded for step in steps) == 3  # the prompt's last chunk drew the first of four


async def test_a_client_that_does_not_read_is_cut_off_and_its_row_freed():
    async with running(num_rows=1, max_behind=50) as link:
        slow, next_one = generate(link, "a", [1]), generate(link, "b", [1], max_new_tokens=5)
        assert (await ending(next_one)).finish_reason == "length"  # this sequence had to wait for the row
        (last,) = await collect(slow)
        assert (last.finish_reason, last.error) == ("error", "the client reads too slowly: 50 events were unread")


async def test_an_exception_over_one_sequence_ends_that_one_only():
    async with running() as link:
        good, bad = generate(link, "a", [1], max_new_tokens=50), generate(link, "b", [RAISE_TOKEN])
        assert "RuntimeError: the fake device has failed" in (await ending(bad)).error
        assert (await ending(good)).finish_reason == "length"
        assert (link.state, link.restarts) == ("ready", 0)

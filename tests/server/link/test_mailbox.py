"""Tests of the mailbox that holds a sequence's messages."""

import asyncio

import pytest

from server.link.mailbox import Stream, untimed_ending
from server.protocol.messages import Ended, Token

pytestmark = pytest.mark.anyio


async def test_take_gives_all_that_is_there():
    stream = Stream(max_behind=3)
    taking = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    assert stream.put(Token("a", 1, 0.0))
    assert stream.put(Token("a", 2, 0.0))
    assert [message.token for message in await taking] == [1, 2]
    tokens = [Token("a", i, 0.0) for i in range(3)]
    assert all(stream.put(token) for token in tokens)
    assert await stream.take() == tokens


async def test_an_ending_is_no_overflow_and_nothing_follows_it():
    stream, full = Stream(max_behind=1), Stream(max_behind=1)
    last = Ended("a", "length", None)
    assert stream.put(Token("a", 1, 0.0))
    assert stream.put(last)
    assert not stream.put(last)
    assert await stream.take() == [Token("a", 1, 0.0), last]
    assert full.put(Token("a", 1, 0.0))
    assert not full.put(Token("a", 2, 0.0))
    assert not full.put(last)
    (cut_off,) = await full.take()
    assert cut_off.finish_reason == "error"
    with pytest.raises(AssertionError, match="nothing comes after"):
        await full.take()


async def test_a_consumer_that_gave_up_waiting_can_come_back():
    stream = Stream(max_behind=1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream.take(), 0.01)
    stream.put(Token("a", 1, 0.0))
    assert len(await stream.take()) == 1


async def test_tokens_are_poured_in_the_turn_in_which_they_come():
    stream, poured = Stream(max_behind=9), []
    pouring = asyncio.create_task(stream.pour(lambda token: poured.append(token.token) or len(poured) < 3))
    await asyncio.sleep(0)
    for number in (1, 2):
        assert stream.put(Token("a", number, 0.0))
    assert poured == [1, 2]
    assert not pouring.done()
    stream.put(Token("a", 3, 0.0))  # the sink refuses this token
    stream.put(Token("a", 4, 0.0))  # so this token must not overtake it
    await pouring
    assert [message.token for message in await stream.take()] == [3, 4]
    assert poured == [1, 2, 3]


async def test_what_is_no_token_ends_the_pouring_and_is_there_to_be_taken():
    stream, last = Stream(max_behind=9), untimed_ending("a", "length")
    pouring = asyncio.create_task(stream.pour(lambda token: True))
    await asyncio.sleep(0)
    stream.put(last)
    await pouring
    assert await stream.take() == [last]


async def test_nothing_is_poured_past_what_is_unread():
    stream = Stream(max_behind=9)
    stream.put(Token("a", 1, 0.0))
    await stream.pour(lambda token: True)
    assert [message.token for message in await stream.take()] == [1]


async def test_a_sink_that_fails_fails_its_consumer_and_nobody_else():
    def fail(token: Token) -> bool:
        raise ValueError("no such token")

    stream = Stream(max_behind=9)
    pouring = asyncio.create_task(stream.pour(fail))
    await asyncio.sleep(0)
    assert stream.put(Token("a", 1, 0.0))
    assert stream.put(Token("a", 2, 0.0))
    with pytest.raises(ValueError, match="no such token"):
        await pouring

"""The mailbox of one sequence."""

import asyncio

import pytest

from server.messages import Ended, Token
from server.stream import Stream

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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

"""Tests of coroutines that begin outside a task and are finished or closed later."""

import asyncio

import pytest

from server.requests.coroutine import begin

pytestmark = pytest.mark.anyio


class Door:
    """A coroutine that waits for two events in turn, and a record of how far it came."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.steps: list[str] = []

    async def walk(self) -> None:
        self.steps.append("begun")
        try:
            await self.opened.wait()
            await asyncio.sleep(0.001)
            self.steps.append("through")
        finally:
            self.steps.append("left")


async def test_one_that_need_not_wait_has_ended():
    door = Door()
    door.opened.set()

    async def write() -> None:
        await door.opened.wait()
        door.steps.append("written")

    assert begin(write()) is None
    assert door.steps == ["written"]


@pytest.mark.parametrize("late", [False, True])
async def test_one_that_has_to_wait_goes_on_in_the_task_that_awaits_the_rest(late):
    door = Door()
    rest = begin(door.walk())
    assert rest is not None
    assert door.steps == ["begun"]
    if late:
        door.opened.set()  # before anything awaits the rest of the coroutine
        await asyncio.sleep(0)
    else:
        asyncio.get_running_loop().call_later(0.005, door.opened.set)
    await rest
    assert door.steps == ["begun", "through", "left"]


async def test_a_cancellation_reaches_it():
    door = Door()
    rest = begin(door.walk())
    assert rest is not None

    async def finish() -> None:
        await rest

    task = asyncio.create_task(finish())
    await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert door.steps == ["begun", "left"]


@pytest.mark.parametrize("waits", [False, True])
async def test_what_it_raises_is_raised(waits):
    async def fail() -> None:
        if waits:
            await asyncio.sleep(0.001)
        raise ValueError("broken")

    async def run() -> None:
        rest = begin(fail())
        assert rest is not None
        await rest

    with pytest.raises(ValueError, match="broken"):
        await run()

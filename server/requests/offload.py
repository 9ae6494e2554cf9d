"""Moves long work from the event loop to a thread, so that other streams continue meanwhile."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

INLINE_BYTES = 1 << 14  # work on fewer bytes takes under a millisecond, about what the move to a thread costs

Result = TypeVar("Result")


async def beside_the_loop(work: Callable[[], Result], *, size: int) -> Result:
    """Return the result of `work` on `size` bytes, done in a thread if it would delay other streams."""
    return work() if size <= INLINE_BYTES else await asyncio.to_thread(work)

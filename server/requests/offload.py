"""Work that takes long is done in a thread, beside the event loop, so that the streams of others go on."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

INLINE_BYTES = 1 << 14  # reading less takes under a millisecond, as long as moving it to a thread

Result = TypeVar("Result")


async def beside_the_loop(work: Callable[[], Result], *, size: int) -> Result:
    """Do `work` on `size` bytes: in a thread where it would hold up the streams of others."""
    return work() if size <= INLINE_BYTES else await asyncio.to_thread(work)

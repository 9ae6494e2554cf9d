"""What all tests share: one thread a process, the event loop, and no test left out where CI runs them."""

import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests that start processes would fight over the cores
# A job in the background ignores Ctrl-C, and so would the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The event loop of the server."""
    return "asyncio", {"use_uvloop": True}

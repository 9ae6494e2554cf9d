"""Set-up that all tests share: one thread a process, the server's event loop, and no skips in CI."""

import os
import signal
from collections.abc import Generator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # otherwise tests that start processes would compete for the cores
# A job in the background ignores Ctrl-C, and so would the programs that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Return the event loop that the server uses."""
    return "asyncio", {"use_uvloop": True}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests for a GPU if the machine has none."""
    for_a_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_a_gpu and not has_gpu():
        config.hook.pytest_deselected(items=for_a_gpu)
        items[:] = [item for item in items if item not in for_a_gpu]


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Report on a file of tests, which must not skip itself in CI."""
    report = yield
    fail_where_skipped_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report on a test, which must not be skipped in CI."""
    report = yield
    fail_where_skipped_in_ci(report)
    return report


def fail_where_skipped_in_ci(report: pytest.CollectReport | pytest.TestReport) -> None:
    """Turn a skip into a failure with the reason. A test that is known to fail (xfail) is not a skip."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} is skipped, but CI must run every test. {reason}"

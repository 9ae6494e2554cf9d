"""Start a server for a benchmark, and read what its processes use: CPU seconds and memory, from /proc."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.client import Address

ROOT = Path(__file__).parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
START_S = 300.0  # a server that is not ready after this time has failed


class ServerProcess:
    """A context manager that runs `python -m server` on a free port. `log` is the file of the server's output."""

    def __init__(self, flags: Sequence[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address: Address = free.getsockname()[:2]
        self._folder = tempfile.TemporaryDirectory(prefix="allattn-bench-")
        self.log = Path(self._folder.name) / "server.log"
        command = [sys.executable, "-m", "server", "--port", str(self.address[1]), *flags]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        """Wait until the server is ready. Raises RuntimeError if it ends first or takes too long."""
        deadline = time.monotonic() + START_S
        while not is_ready(self.address):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the server did not start:\n{self.tail()}")
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._folder.cleanup()

    def stop(self, *, timeout_s: float = 60.0) -> int:
        """End the server with SIGTERM, or with SIGKILL after `timeout_s`; return its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def tail(self, num_lines: int = 20) -> str:
        """Return the last lines of the server's output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])


def get_json(address: Address, path: str) -> Any:
    """Return the JSON that a GET gives. Raises OSError if there is no answer, or if its status is not a success."""
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}{path}", timeout=10) as reply:
        return json.load(reply)


def is_ready(address: Address) -> bool:
    """Return whether the server accepts requests."""
    try:
        get_json(address, "/health/ready")
    except OSError:
        return False
    return True


def cpu_seconds(pid: int | None) -> float | None:
    """Return the CPU seconds that a process has used, user and system; None if there is no such process."""
    fields = _proc_fields(pid, "stat")
    return None if fields is None else (int(fields[11]) + int(fields[12])) / TICKS


def resident_bytes(pid: int | None) -> int | None:
    """Return the resident memory of a process; None if there is no such process."""
    fields = _proc_fields(pid, "statm")
    return None if fields is None else int(fields[1]) * PAGE


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    fields = _proc_fields(pid, "stat")
    return fields is not None and fields[0] not in ("Z", "X")


def _proc_fields(pid: int | None, name: str) -> list[str] | None:
    """Return the fields of a file in /proc that follow the name of the program."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text().rpartition(") ")[2].split()
    except OSError:
        return None


class Costs:
    """The CPU seconds that named processes use from now on; this process has the name "client"."""

    def __init__(self, pids: dict[str, int | None]) -> None:
        self._pids = pids
        self._begun = self._now()

    def per_token(self, num_tokens: int) -> dict[str, float]:
        """Return the CPU microseconds per token of each process that could be measured."""
        now = self._now()
        known = [name for name in now if now[name] is not None and self._begun[name] is not None]
        return {
            f"{name}_us_per_token": round((now[name] - self._begun[name]) / max(num_tokens, 1) * 1e6, 1)
            for name in known
        }

    def _now(self) -> dict[str, Any]:
        return {**{name: cpu_seconds(pid) for name, pid in self._pids.items()}, "client": time.process_time()}


def machine() -> str:
    """Return the name of the processor and the number of cores."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(": ")[2] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores"

"""A server in a process of its own, for tests with other projects' clients."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def live_server(bundle: Path, *arguments: str, keys: str = "") -> Iterator[str]:
    """Serve a bundle and give the URL. `keys`: API keys; if there are any, a client has to send one of them."""
    command = [sys.executable, "-m", "server", "--bundle", str(bundle), "--port", "0", "--device", "cpu", *arguments]
    environment = {**os.environ, **({"ALLATTN_API_KEYS": keys} if keys else {})}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            urls = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in server.stdout)
            url = next((found[0] for found in urls if found), None)
            assert url is not None, "the server did not start, its error output says why"
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(timeout=60)
    assert status == 0


def refused_server(bundle: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a whole server that must refuse to start, and return the finished process."""
    command = [sys.executable, "-m", "server", "--bundle", str(bundle), "--port", "0", "--num-rows", "2", *flags]
    environment = {**os.environ, "TMPDIR": str(bundle.parent)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)

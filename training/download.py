"""Download of a file: it appears under its name only when it is complete and its checksum is right.

Knows no corpora. An interrupted download is kept as NAME.part, and the next download resumes it.
"""

# The standard library's client, because pooch verifies checksums but cannot resume (it opens its file "w+b"), and the
# libraries that resume neither finish atomically nor lock. urllib obeys http_proxy, https_proxy and no_proxy.

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, build_opener, getproxies, proxy_bypass

from tqdm import tqdm

PAUSES = (1.0, 4.0, 15.0)  # seconds before each retry; the count restarts whenever new bytes arrive
TIMEOUT = 30.0  # seconds that a server may take to send its next bytes
CHUNK = 1 << 18  # bytes
RETRY_STATUSES = {408, 429, 500, 502, 503, 504}  # HTTP statuses of errors that may be temporary


class DownloadError(ValueError):
    """A download that failed; the message says why."""


@dataclass(frozen=True)
class Remote:
    """A file on the web whose size and checksum are known."""

    urls: tuple[str, ...]  # of the same file, tried in this order
    size: int  # bytes
    sha256: str

    @property
    def name(self) -> str:
        """The file name: the last part of the first URL."""
        return self.urls[0].rpartition("/")[2]


class _RequestError(Exception):
    """A request that failed. `passing` says whether a retry may succeed."""

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


def download(remote: Remote, *, folder: Path, pauses: Sequence[float] = PAUSES) -> Path:
    """The path of the file in `folder`; downloads the file if it is not there.

    Several processes may call this at the same time: one process downloads, the other processes wait for it.

    Args:
        remote: the file.
        folder: created if it is missing.
        pauses: seconds to wait before each retry after a request that brought no new bytes.

    Raises:
        DownloadError: no URL gives the file, or the file cannot be written. The message says how much of an interrupted
            download is kept; nothing is kept of a file with a wrong size or checksum, or if the disk is full.
    """
    path, part = folder / remote.name, folder / f"{remote.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not (path.exists() and path.stat().st_size == remote.size):
            with _locked(part) as file:
                if file is not None:  # else another process finished or gave up while this process waited
                    _download_locked(file, remote, part=part, path=path, pauses=pauses)
    except OSError as error:  # network errors are _RequestError
        raise DownloadError(
            f"{path} cannot be written: {error.strerror}; {remote.size} bytes are needed in {folder}"
        ) from error
    return path


def _download_locked(file: BufferedRandom, remote: Remote, *, part: Path, path: Path, pauses: Sequence[float]) -> None:
    try:
        _complete(file, remote, folder=path.parent, pauses=pauses)
        _publish(file, part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    except DownloadError:
        if _end(file) == 0:
            part.unlink()
        raise


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[BufferedRandom | None]:
    """The open and locked NAME.part; None if another process renamed or deleted it while this process waited."""
    with part.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(f"{part} is being downloaded by another process; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            is_there = os.path.samestat(os.fstat(file.fileno()), part.stat())
        except FileNotFoundError:
            is_there = False
        yield file if is_there else None


def _publish(file: BufferedRandom, part: Path, path: Path) -> None:
    """Rename a complete file to its final name; after a power failure it is whole, under one of the two names."""
    os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _complete(file: BufferedRandom, remote: Remote, *, folder: Path, pauses: Sequence[float]) -> None:
    """Fill `file` from the first URL that gives the right bytes."""
    missing = remote.size - min(_end(file), remote.size)
    free = shutil.disk_usage(folder).free
    if free < missing:
        raise DownloadError(f"{folder} has {free} bytes free; {missing} are needed for {remote.name}")
    reasons = []
    for url in remote.urls:
        try:
            _fill_and_verify(file, url, remote, pauses=pauses)
            return
        except _RequestError as error:
            reasons.append(str(error))
    kept = f"; {_end(file)} of {remote.size} bytes are kept, to go on from" if _end(file) else ""
    raise DownloadError(f"{remote.name} cannot be downloaded: {'; '.join(reasons)}{kept}")


def _fill_and_verify(file: BufferedRandom, url: str, remote: Remote, *, pauses: Sequence[float]) -> None:
    """Fill `file` from one URL; start anew if its earlier bytes were wrong (the checksum shows it without an ETag)."""
    was_begun = _end(file) > 0
    _fill(file, url, remote, pauses=pauses)
    if _sha256(file) != remote.sha256 and was_begun:
        file.truncate(0)
        _fill(file, url, remote, pauses=pauses)
    found = _sha256(file)
    if found != remote.sha256:
        file.truncate(0)
        raise _RequestError(f"{url} gives a file of sha256 {found}, expected {remote.sha256}")


def _fill(file: BufferedRandom, url: str, remote: Remote, *, pauses: Sequence[float]) -> None:
    """Send requests until `file` has all bytes; requests that bring new bytes do not count as failures."""
    largest, failures = _end(file), 0
    while _end(file) != remote.size:
        try:
            _request(file, url, remote)
        except _RequestError as error:
            largest, failures = (_end(file), 0) if _end(file) > largest else (largest, failures + 1)
            if not error.passing or failures > len(pauses):
                raise
            pause = pauses[max(failures - 1, 0)] if pauses else 0.0
            tqdm.write(f"{error}; trying again in {pause:g} s", file=sys.stderr)
            time.sleep(pause)


def _request(file: BufferedRandom, url: str, remote: Remote) -> None:
    """Send one request for the bytes that are missing at the end of `file`."""
    offset = _end(file)
    try:
        response = _open(url, offset=offset)
    except HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # the file at the URL is shorter than `file`
            file.truncate(0)
        passing = error.code in RETRY_STATUSES or offset > _end(file)
        raise _RequestError(f"{url} answers {error.code} {error.reason}{_via(url)}", passing=passing) from error
    except (OSError, http.client.HTTPException) as error:
        raise _no_connection(url, error) from error
    with response:
        _seek_to_start(response, file, url=url, size=remote.size)
        with _bar(remote, start=file.tell()) as bar:
            while chunk := _read(response, url):
                if file.tell() + len(chunk) > remote.size:
                    file.truncate(0)
                    raise _RequestError(f"{url} gives more than {remote.size} bytes")
                file.write(chunk)
                bar.update(len(chunk))
    if _end(file) < remote.size:
        raise _RequestError(f"{url} broke off after {_end(file)} of {remote.size} bytes{_via(url)}", passing=True)


def _open(url: str, *, offset: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "allattn"} | ({"Range": f"bytes={offset}-"} if offset else {})
    response: http.client.HTTPResponse = build_opener().open(Request(url, headers=headers), timeout=TIMEOUT)
    return response


def _seek_to_start(response: http.client.HTTPResponse, file: BufferedRandom, *, url: str, size: int) -> None:
    """Truncate `file` where the response begins: at the end of `file`, or at 0 if the server has no range requests."""
    start, total = 0, response.length  # None if the server does not say
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        place = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        start = int(place[1]) if place else -1
        total = int(place[2]) if place and place[2] != "*" else None
    if not 0 <= start <= _end(file):
        file.truncate(0)
        raise _RequestError(f"{url} answers with another part of the file than the one asked for", passing=True)
    if total is not None and total != size:
        file.truncate(0)
        raise _RequestError(f"{url} is a file of {total} bytes, expected {size}{_via(url)}")
    if start < _end(file):
        file.truncate(start)
        file.seek(start)


def _read(response: http.client.HTTPResponse, url: str) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _RequestError(f"{url} broke off: {error}{_via(url)}", passing=True) from error


def _no_connection(url: str, error: Exception) -> _RequestError:
    """The error for a request without an answer. A refusal is final; a missing name or route may be temporary."""
    reason = error.reason if isinstance(error, URLError) else error
    refused = isinstance(
        reason, ConnectionRefusedError | ssl.SSLCertVerificationError
    ) or "Tunnel connection failed: 4" in str(reason)
    return _RequestError(f"{url} cannot be reached{_via(url)}: {reason}", passing=not refused)


def _via(url: str) -> str:
    """The proxy of a request, for messages, because most failures behind a proxy come from the proxy."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy is None or proxy_bypass(parts.netloc):
        return ""
    without_password = proxy.rpartition("@")[2]
    return f" through the proxy {without_password} that {parts.scheme}_proxy names"


def _bar(remote: Remote, *, start: int) -> "tqdm[None]":
    pause = 0.1 if sys.stderr.isatty() else 30.0  # seconds between redraws; a log file needs few
    return tqdm(
        total=remote.size,
        initial=start,
        desc=remote.name,
        unit="B",
        unit_scale=True,
        mininterval=pause,
        maxinterval=pause,
    )


def _end(file: BufferedRandom) -> int:
    return file.seek(0, os.SEEK_END)


def _sha256(file: BufferedRandom) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()

"""A file from the web: whole and with the right check sum under its name, or not there at all.

Knows no corpora. A download that is cut off stays beside it as NAME.part, and the next one goes on from its end.
"""

# The standard library's client: pooch has the check sums but begins anew (its file is opened "w+b"), and the libraries
# that resume neither finish atomically nor lock. urllib obeys http_proxy, https_proxy and no_proxy.

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

PAUSES = (1.0, 4.0, 15.0)  # seconds before each further request, counted anew whenever bytes have come
TIMEOUT = 30.0  # seconds in which a server must give its next bytes
CHUNK = 1 << 18  # bytes
WORTH_ANOTHER_TRY = {408, 429, 500, 502, 503, 504}  # statuses that pass by themselves


class DownloadError(ValueError):
    """A file that cannot be had, and why."""


@dataclass(frozen=True)
class Remote:
    """A file on the web, known to the byte."""

    urls: tuple[str, ...]  # all of the same bytes, tried in this order
    size: int  # bytes
    sha256: str

    @property
    def name(self) -> str:
        """The last part of the first address."""
        return self.urls[0].rpartition("/")[2]


class _RequestError(Exception):
    """A request that did not give what it should, and whether the same one may do better."""

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


def download(remote: Remote, *, folder: Path, pauses: Sequence[float] = PAUSES) -> Path:
    """The path of the file in `folder`, where it is downloaded unless it is there.

    Several processes may ask at once: one downloads, the others wait for it.

    Args:
        remote: the file.
        folder: made where it is missing.
        pauses: seconds to wait before each further request after one that brought nothing new.

    Raises:
        DownloadError: no address gives the file, or the folder cannot take it. What is kept of a cut-off download is
            named; of a file with a wrong size or sum, and on a full disk, nothing is kept.
    """
    path, part = folder / remote.name, folder / f"{remote.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not (path.exists() and path.stat().st_size == remote.size):
            with _locked(part) as file:
                if file is not None:  # else another process finished or gave up while this one waited
                    _download_locked(file, remote, part=part, path=path, pauses=pauses)
    except OSError as error:  # those of the network are _RequestError by now
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
    """The file of a download, held by one process at a time; None where it has been taken away during the wait."""
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
    """Give a complete file its name; a power failure leaves it under one name or the other, and whole."""
    os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _complete(file: BufferedRandom, remote: Remote, *, folder: Path, pauses: Sequence[float]) -> None:
    """Fill `file` from the first address that gives the right bytes."""
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
    """All bytes from one address. What was there before may be of other bytes; the sum tells, so no ETag is kept."""
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
    """Request after request until `file` has all bytes, patient for as long as each brings new ones."""
    most, failures = _end(file), 0
    while _end(file) != remote.size:
        try:
            _request(file, url, remote)
        except _RequestError as error:
            most, failures = (_end(file), 0) if _end(file) > most else (most, failures + 1)
            if not error.passing or failures > len(pauses):
                raise
            pause = pauses[max(failures - 1, 0)] if pauses else 0.0
            tqdm.write(f"{error}; trying again in {pause:g} s", file=sys.stderr)
            time.sleep(pause)


def _request(file: BufferedRandom, url: str, remote: Remote) -> None:
    """One request for what is missing at the end of `file`."""
    offset = _end(file)
    try:
        response = _open(url, offset=offset)
    except HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # the file there ends before this one
            file.truncate(0)
        passing = error.code in WORTH_ANOTHER_TRY or offset > _end(file)
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
    """Cut `file` off where a response begins: at its end, or at 0 from a server that does not know of ranges."""
    start, total = 0, response.length  # None where the server does not say
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
    """Why there was no answer. A refusal is final; a name or a route that is missing may be back in a moment."""
    reason = error.reason if isinstance(error, URLError) else error
    refused = isinstance(
        reason, ConnectionRefusedError | ssl.SSLCertVerificationError
    ) or "Tunnel connection failed: 4" in str(reason)
    return _RequestError(f"{url} cannot be reached{_via(url)}: {reason}", passing=not refused)


def _via(url: str) -> str:
    """Name the proxy that a request goes through, as most failures behind one are the proxy's own."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy is None or proxy_bypass(parts.netloc):
        return ""
    without_password = proxy.rpartition("@")[2]
    return f" through the proxy {without_password} that {parts.scheme}_proxy names"


def _bar(remote: Remote, *, start: int) -> "tqdm[None]":
    pause = 0.1 if sys.stderr.isatty() else 30.0  # seconds between redrawings; a log file wants few
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

"""Downloads against a real server on this machine that fails in every way a server, a proxy or a disk can."""

import hashlib
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import training.download
from tests.support.file_server import Answer, Server, forget_proxies
from training.download import DownloadError, Remote, download

CONTENT = np.random.default_rng(0).integers(0, 256, 1_500_000, np.uint8).tobytes()
HALF = len(CONTENT) // 2
OTHER = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
NO_PAUSES = (0.0, 0.0, 0.0)


Servers = list[Server]


@pytest.fixture
def servers() -> Iterator[Servers]:
    started: Servers = []
    yield started
    for server in started:
        server.stop()


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_proxies(monkeypatch)


def serve(servers: Servers, *answers: Answer) -> Server:
    server = Server(CONTENT, *answers)
    servers.append(server)
    return server


def remote(*urls: str) -> Remote:
    return Remote(urls, size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())


def assert_downloads(file: Remote, folder: Path) -> None:
    path = download(file, folder=folder, pauses=NO_PAUSES)
    assert path == folder / "corpus.zip"
    assert path.read_bytes() == CONTENT
    assert list(folder.iterdir()) == [path]


def failure(file: Remote, folder: Path) -> str:
    with pytest.raises(DownloadError) as caught:
        download(file, folder=folder, pauses=NO_PAUSES)
    assert not (folder / "corpus.zip").exists()
    return str(caught.value)


def test_a_file_is_downloaded_once_and_with_a_bar(
    servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(servers)
    folder = tmp_path / "cache" / "downloads"
    assert_downloads(remote(server.url), folder)
    assert re.search(r"corpus\.zip: 100%.*1\.50M/1\.50M .*B/s", capsys.readouterr().err)
    assert_downloads(remote(server.url), folder)
    assert server.asked == [("/corpus.zip", "")]


def test_a_connection_that_is_cut_again_and_again_costs_no_byte_twice(servers: Servers, tmp_path: Path) -> None:
    pieces = [Answer(cut_after=100_000)] * 14  # more cuts than pauses: each request brought new bytes
    server = serve(servers, *pieces, Answer())
    assert_downloads(remote(server.url), tmp_path)
    assert server.sent == len(CONTENT)
    assert [wanted for _, wanted in server.asked] == ["", *(f"bytes={n}00000-" for n in range(1, 15))]


@pytest.mark.parametrize("end", [{"reset": True}, {"stall": True}], ids=["reset", "silent"])
def test_a_connection_that_breaks_or_falls_silent_is_made_again(
    end: dict[str, bool], servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.download, "TIMEOUT", 0.2)
    server = serve(servers, replace(Answer(cut_after=HALF), **end), Answer())
    assert_downloads(remote(server.url), tmp_path)
    assert len(server.asked) == 2


def test_a_download_that_fails_in_the_middle_is_kept_named_and_continued(
    servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(servers, Answer(cut_after=HALF), Answer(status=503))
    message = failure(remote(server.url), tmp_path)
    assert f"{server.url} answers 503 Service Unavailable" in message
    assert f"{HALF} of {len(CONTENT)} bytes are kept" in message
    assert len(server.asked) == 2 + len(NO_PAUSES)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.zip.part"]
    server.answers = [Answer()]
    capsys.readouterr()
    assert_downloads(remote(server.url), tmp_path)
    assert capsys.readouterr().err.startswith("\rcorpus.zip:  50%")
    assert server.sent == len(CONTENT)


@pytest.mark.parametrize(
    "second",
    [
        Answer(knows_ranges=False),
        Answer(range_shift=-5000),  # a server that aligns ranges to its own blocks
        Answer(range_shift=5000),
        Answer(headers={"Content-Range": "bytes */*"}, status=206),
    ],
    ids=["no ranges", "earlier", "later", "unreadable"],
)
def test_a_rest_that_is_not_what_was_asked_for_is_never_appended(
    second: Answer, servers: Servers, tmp_path: Path
) -> None:
    server = serve(servers, Answer(cut_after=HALF), second, Answer())
    assert_downloads(remote(server.url), tmp_path)


@pytest.mark.parametrize("size", [10, HALF, len(CONTENT), len(CONTENT) + 1])
def test_what_lies_there_of_another_file_is_noticed_by_its_sum_and_replaced(
    size: int, servers: Servers, tmp_path: Path
) -> None:
    (tmp_path / "corpus.zip.part").write_bytes(b"x" * size)
    assert_downloads(remote(serve(servers).url), tmp_path)


def test_a_finished_file_that_was_truncated_is_downloaded_again(servers: Servers, tmp_path: Path) -> None:
    (tmp_path / "corpus.zip").write_bytes(CONTENT[:HALF])
    assert_downloads(remote(serve(servers).url), tmp_path)


@pytest.mark.parametrize("begun", [b"", CONTENT[:HALF]])
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(content=OTHER), [hashlib.sha256(side).hexdigest() for side in (OTHER, CONTENT)]),
        (Answer(content=b"<html>sign in first"), ["19 bytes", "expected 1500000"]),
        (Answer(content=CONTENT + b"x"), ["1500001 bytes", "expected 1500000"]),
        (Answer(content=CONTENT + b"x", says_length=False), ["more than 1500000 bytes"]),
    ],
    ids=["sum", "short", "long", "endless"],
)
def test_a_file_of_another_size_or_sum_is_refused_with_both_and_deleted(
    answer: Answer, words: list[str], begun: bytes, servers: Servers, tmp_path: Path
) -> None:
    if begun:
        (tmp_path / "corpus.zip.part").write_bytes(begun)
        answer = Answer(content=answer.content, says_length=answer.says_length, knows_ranges=answer.says_length)
    server = serve(servers, answer)
    message = failure(remote(server.url), tmp_path)
    assert all(word in message for word in [server.url, *words])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there_is_asked_for_once_and_named(servers: Servers, tmp_path: Path) -> None:
    server = serve(servers, Answer(status=404))
    assert f"{server.url} answers 404 Not Found" in failure(remote(server.url), tmp_path)
    assert len(server.asked) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_busy_is_asked_again_after_a_pause(servers: Servers, tmp_path: Path) -> None:
    server = serve(servers, Answer(status=503), Answer(status=500), Answer())
    begun = time.monotonic()
    download(remote(server.url), folder=tmp_path, pauses=(0.1, 0.2))
    assert time.monotonic() - begun >= 0.3
    assert len(server.asked) == 3


@pytest.mark.parametrize("first", [Answer(status=404), Answer(content=OTHER), Answer(content=b"moved")])
def test_the_next_address_is_tried_when_the_first_fails(first: Answer, servers: Servers, tmp_path: Path) -> None:
    bad, good = serve(servers, first), serve(servers)
    assert_downloads(remote(bad.url, good.url), tmp_path)
    assert len(good.asked) == 1


def test_the_next_address_continues_what_the_first_began(servers: Servers, tmp_path: Path) -> None:
    bad, good = serve(servers, Answer(cut_after=HALF), Answer(status=404)), serve(servers)
    assert_downloads(remote(bad.url, good.url), tmp_path)
    assert (bad.sent, good.sent) == (HALF, len(CONTENT) - HALF)


def test_where_all_addresses_fail_each_is_named(servers: Servers, tmp_path: Path) -> None:
    first, second = serve(servers, Answer(status=404)), serve(servers, Answer(status=403))
    message = failure(remote(first.url, second.url), tmp_path)
    assert f"{first.url} answers 404" in message
    assert f"{second.url} answers 403" in message


def closed_port() -> str:
    server = Server(CONTENT)
    server.stop()
    return server.address


def test_a_server_that_is_not_there_is_named_and_not_waited_for(tmp_path: Path) -> None:
    address = closed_port()
    begun = time.monotonic()
    with pytest.raises(DownloadError, match=rf"{address}/corpus\.zip cannot be reached: .*Connection refused"):
        download(remote(f"{address}/corpus.zip"), folder=tmp_path)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("status", [407, 502, None])
def test_a_proxy_that_fails_is_named_with_its_setting_and_without_its_password(
    scheme: str, status: int | None, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve(servers, Answer(status=status)) if status else None
    place = (proxy.address if proxy else closed_port()).removeprefix("http://")
    monkeypatch.setenv(f"{scheme}_proxy", f"http://me:secret@{place}")
    message = failure(remote(f"{scheme}://corpora.invalid/corpus.zip"), tmp_path)
    assert f"{scheme}://corpora.invalid/corpus.zip" in message
    assert f"through the proxy {place} that {scheme}_proxy names" in message
    assert (str(status) if status else "Connection refused") in message
    assert "secret" not in message
    if proxy:
        assert len(proxy.asked) == (1 if status == 407 else 1 + len(NO_PAUSES))
    assert list(tmp_path.iterdir()) == []


def test_a_working_proxy_is_used(servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve(servers)
    monkeypatch.setenv("http_proxy", proxy.address)
    assert_downloads(remote("http://corpora.invalid/corpus.zip"), tmp_path)
    assert proxy.asked == [("http://corpora.invalid/corpus.zip", "")]


def test_a_disk_without_room_is_noticed_before_anything_is_fetched(servers: Servers, tmp_path: Path) -> None:
    server = serve(servers)
    too_large = Remote((server.url,), size=10**18, sha256="")
    message = failure(too_large, tmp_path)
    assert re.search(rf"{tmp_path} has \d+ bytes free; {10**18} are needed for corpus\.zip", message)
    assert (server.asked, list(tmp_path.iterdir())) == ([], [])


def test_a_disk_that_fills_up_is_named_and_keeps_nothing(servers: Servers, tmp_path: Path) -> None:
    server = serve(servers)
    (tmp_path / "corpus.zip.part").symlink_to("/dev/full")
    message = failure(remote(server.url), tmp_path)
    assert f"{tmp_path}/corpus.zip cannot be written: No space left on device; 1500000 bytes are needed" in message
    assert list(tmp_path.iterdir()) == []
    assert_downloads(remote(server.url), tmp_path)


def test_a_limit_reached_in_the_middle_keeps_nothing(servers: Servers, tmp_path: Path) -> None:
    server = serve(servers)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, hard))
    try:
        assert "cannot be written: File too large; 1500000 bytes" in failure(remote(server.url), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"file/downloads/corpus\.zip cannot be written: Not a directory"):
        download(remote("http://127.0.0.1/corpus.zip"), folder=tmp_path / "file" / "downloads")


def test_of_many_that_ask_at_once_one_downloads_and_all_have_the_file(servers: Servers, tmp_path: Path) -> None:
    server = serve(servers, Answer(cut_after=HALF), Answer())
    with ThreadPoolExecutor(8) as pool:
        waits = [
            pool.submit(download, remote(server.url), folder=tmp_path, pauses=(0.3,))  # time for all processes to call
            for _ in range(8)
        ]
        assert {wait.result().read_bytes() for wait in waits} == {CONTENT}
    assert server.sent == len(CONTENT)
    assert list(tmp_path.iterdir()) == [tmp_path / "corpus.zip"]


def test_when_the_one_that_downloads_fails_the_next_one_tries(servers: Servers, tmp_path: Path) -> None:
    server = serve(servers, Answer(status=503), Answer(status=404), Answer())
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(download, remote(server.url), folder=tmp_path, pauses=(0.3,)) for _ in range(2)]
        failures = [wait.exception() for wait in waits]
    assert sorted(type(error).__name__ for error in failures) == ["DownloadError", "NoneType"]
    assert (tmp_path / "corpus.zip").read_bytes() == CONTENT


PROGRAM = """
import sys
from pathlib import Path
from training.download import Remote, download
download(Remote((sys.argv[1],), size=int(sys.argv[2]), sha256=sys.argv[3]), folder=Path(sys.argv[4]))
"""


def test_a_process_killed_in_the_middle_leaves_what_the_next_one_continues(servers: Servers, tmp_path: Path) -> None:
    server = serve(servers, Answer(cut_after=HALF, stall=True), Answer())
    file = remote(server.url)
    arguments = [sys.executable, "-c", PROGRAM, server.url, str(file.size), file.sha256, str(tmp_path)]
    process = subprocess.Popen(arguments, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    part = tmp_path / "corpus.zip.part"
    try:
        end = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size > HALF - (1 << 18)):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "corpus.zip").exists()
    kept, file_number = part.stat().st_size, part.stat().st_ino
    server.sent = 0
    assert_downloads(file, tmp_path)
    assert server.sent == len(CONTENT) - kept
    assert server.asked[-1] == ("/corpus.zip", f"bytes={kept}-")
    assert (tmp_path / "corpus.zip").stat().st_ino == file_number  # renamed, which is atomic, and not copied

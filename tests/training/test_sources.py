"""Published corpora from the web, an archive, a folder or a file: the same bytes or an error; the real formats."""

import hashlib
import io
import lzma
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.file_server import Answer, Server, forget_proxies
from training.config import DataConfig, TokenizerConfig
from training.corpus import Corpus, CorpusError, load_corpus, prepare
from training.download import Remote
from training.run import main
from training.sources import PUBLISHED, Member, Published

TEXT = "".join(f"<page> {number} the café </page>\n" for number in range(500)).encode()
SPLITS = ("train", "valid", "test")
CONFIG = Path(__file__).parents[2] / "configs" / "enwik8_18l.toml"
REAL_WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext"
# The first lines of WikiText's validation and test files, to the byte (CC BY-SA 3.0, from English Wikipedia).
WIKITEXT_VALID = (
    " \n"
    " = Homarus gammarus = \n"
    " \n"
    " Homarus gammarus , known as the European lobster or common lobster , is a species of <unk> lobster from the "
    "eastern Atlantic Ocean , Mediterranean Sea and parts of the Black Sea . It is closely related to the American "
    "lobster , H. americanus . It may grow to a length of 60 cm ( 24 in ) and a mass of 6 kilograms ( 13 lb ) , "
    'and bears a conspicuous pair of claws . In life , the lobsters are blue , only becoming " lobster red " on '
    "cooking . Mating occurs in the summer , producing eggs which are carried by the females for up to a year "
    "before hatching into <unk> larvae . Homarus gammarus is a highly esteemed food , and is widely caught using "
    "lobster pots , mostly around the British Isles . \n"
    " \n"
    " = = Description = = \n"
    " \n"
    " Homarus gammarus is a large <unk> , with a body length up to 60 centimetres ( 24 in ) and weighing up to 5 "
    "\u2013 6 kilograms ( 11 \u2013 13 lb ) , although the lobsters caught in lobster pots are usually 23 \u2013 "
    "38 cm ( 9 \u2013 15 in ) long and weigh 0 @.@ 7 \u2013 2 @.@ 2 kg ( 1 @.@ 5 \u2013 4 @.@ 9 lb ) . Like other "
    "crustaceans , lobsters have a hard <unk> which they must shed in order to grow , in a process called <unk> ( "
    "<unk> ) . This may occur several times a year for young lobsters , but decreases to once every 1 \u2013 2 "
    "years for larger animals . \n"
)
WIKITEXT_TEST = (
    " \n"
    " = Robert <unk> = \n"
    " \n"
    " Robert <unk> is an English film , television and theatre actor . He had a guest @-@ starring role on the "
    "television series The Bill in 2000 . This was followed by a starring role in the play Herons written by Simon "
    "Stephens , which was performed in 2001 at the Royal Court Theatre . He had a guest role in the television "
    'series Judge John <unk> in 2002 . In 2004 <unk> landed a role as " Craig " in the episode " Teddy \'s Story '
    '" of the television series The Long Firm ; he starred alongside actors Mark Strong and Derek Jacobi . He was '
    "cast in the 2005 theatre productions of the Philip Ridley play Mercury Fur , which was performed at the Drum "
    "Theatre in Plymouth and the <unk> <unk> Factory in London . He was directed by John <unk> and starred "
    "alongside Ben <unk> , Shane <unk> , Harry Kent , Fraser <unk> , Sophie Stanton and Dominic Hall . \n"
)


def data(folder: Path, **changes: Any) -> DataConfig:
    fields: dict[str, Any] = {"batch": 1, "block": 2, "cache_dir": folder / "cache"}
    return DataConfig.model_validate(fields | changes)


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def of_files(*texts: str | bytes) -> dict[str, bytes]:
    """WikiText's archive: three files in a folder, beside unneeded files."""
    contents = [text.encode() if isinstance(text, str) else text for text in texts]
    files = {f"wikitext-103/wiki.{split}.tokens": text for split, text in zip(SPLITS, contents, strict=True)}
    return {"wikitext-103/": b"", "../outside": b"x", "__MACOSX/._wiki.train.tokens": b"x"} | files


def publish(monkeypatch: pytest.MonkeyPatch, name: str, archive: Path, *, address: str = "http://x.invalid") -> None:
    """Make `archive`, which is smaller than the real one, the published archive of `name`."""
    content = archive.read_bytes()
    members = PUBLISHED[name].members
    if len(members) == 1:
        members = (Member(name, size=len(TEXT), sha256=sha256(TEXT)),)
    else:
        members = tuple(replace(member, num_lines=None) for member in members)
    remote = Remote((f"{address}/{archive.name}",), size=len(content), sha256=sha256(content))
    monkeypatch.setitem(PUBLISHED, name, Published(remote, members))


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_proxies(monkeypatch)


@pytest.fixture
def enwik8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small archive in place of enwik8's."""
    archive = zipped(tmp_path / "given" / "enwik8.zip", {"enwik8": TEXT})
    publish(monkeypatch, "enwik8", archive)
    return archive


@pytest.fixture
def wikitext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of WikiText's format with the beginnings of its files."""
    archive = zipped(tmp_path / "given" / "wikitext-103-v1.zip", of_files("a b\n", WIKITEXT_VALID, WIKITEXT_TEST))
    publish(monkeypatch, "wikitext103", archive)
    return archive


def test_every_published_corpus_is_known_to_the_byte() -> None:
    for published in PUBLISHED.values():
        assert published.archive.size > 30_000_000
        sums = [published.archive.sha256, *(member.sha256 for member in published.members if member.sha256)]
        assert all(len(bytes.fromhex(sum)) == 32 for sum in sums)
        assert all(url.endswith(".zip") for url in published.archive.urls)
        assert all(member.size or member.num_lines for member in published.members)


@pytest.mark.parametrize("kind", ["zip", "file", "xz", "folder"])
def test_one_text_is_read_from_an_archive_a_file_or_a_folder_and_cut_to_the_byte(
    kind: str, enwik8: Path, tmp_path: Path
) -> None:
    place = tmp_path / "copies" / "deep"
    place.mkdir(parents=True)
    (place / "enwik8").write_bytes(TEXT)
    (place / "enwik8.xz").write_bytes(lzma.compress(TEXT))
    paths = {"zip": enwik8, "file": place / "enwik8", "xz": place / "enwik8.xz", "folder": tmp_path / "copies"}
    corpus = load_corpus(data(tmp_path, name="enwik8", path=paths[kind]))
    cuts = len(TEXT) * 90 // 100, len(TEXT) * 95 // 100
    assert corpus == Corpus("enwik8", TEXT[: cuts[0]], TEXT[cuts[0] : cuts[1]], TEXT[cuts[1] :])


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_wikitext_is_its_own_three_files_and_nothing_else_is_unpacked(
    kind: str, wikitext: Path, tmp_path: Path
) -> None:
    path = wikitext
    if kind == "folder":
        path = tmp_path / "copies"
        for name, content in of_files("a b\n", WIKITEXT_VALID, WIKITEXT_TEST).items():
            if "wiki." in name:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    corpus = load_corpus(data(tmp_path, name="wikitext103", path=path))
    assert corpus == Corpus("wikitext103", b"a b\n", WIKITEXT_VALID.encode(), WIKITEXT_TEST.encode())
    assert sorted(tmp_path.rglob("*")) == before


def field_tokens(text: str, vocabulary: set[str]) -> list[str]:
    """The words of each line, also of an empty line, and <eos>, as in Transformer-XL (add_eos)."""
    tokens = [word for line in io.StringIO(text) for word in (*line.split(), "<eos>")]
    return [word if word in vocabulary else "<unk>" for word in tokens]


def test_tokens_of_wikitext_are_the_words_of_each_line_and_its_end(wikitext: Path, tmp_path: Path) -> None:
    zipped(wikitext, of_files(WIKITEXT_VALID * 2, WIKITEXT_VALID, WIKITEXT_TEST))
    dataset = prepare(data(tmp_path, name="wikitext103", path=wikitext), TokenizerConfig(kind="word"))
    vocabulary = set(field_tokens(WIKITEXT_VALID, set(WIKITEXT_VALID.split()) | {"<eos>"}))
    assert dataset.tokenizer.vocab_size == len(vocabulary | {"<unk>"})
    assert dataset.test is not None
    for text, ids in ((WIKITEXT_VALID, dataset.valid), (WIKITEXT_TEST, dataset.test)):
        words = dataset.tokenizer.decode(ids.tolist()).replace("\n", " <eos> ").split()
        assert words == field_tokens(text, vocabulary)
    assert len(dataset.train) == 2 * len(dataset.valid)
    heading = ["=", "Homarus", "gammarus", "="]
    assert field_tokens(WIKITEXT_VALID, vocabulary)[:7] == ["<eos>", *heading, "<eos>", "<eos>"]


def test_the_real_validation_and_test_files_have_the_published_numbers_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not REAL_WIKITEXT.exists():
        pytest.skip(f"{REAL_WIKITEXT} is not on this machine")
    valid, test = ((REAL_WIKITEXT / f"{split}.txt").read_bytes() for split in ("valid", "test"))
    archive = zipped(tmp_path / "wikitext.zip", of_files(valid, valid, test))
    members = PUBLISHED["wikitext103"].members  # the numbers of lines of valid and test are the real ones
    changed = (replace(members[0], num_lines=members[1].num_lines), *members[1:])
    monkeypatch.setitem(PUBLISHED, "wikitext103", replace(PUBLISHED["wikitext103"], members=changed))
    dataset = prepare(data(tmp_path, name="wikitext103", path=archive), TokenizerConfig(kind="word"))
    assert dataset.test is not None
    assert (len(dataset.valid), len(dataset.test)) == (217_646, 245_569)
    assert np.array_equal(dataset.train, dataset.valid)


@pytest.mark.parametrize("name", ["enwik8", "wikitext103"])
def test_a_name_alone_is_downloaded_once_into_the_cache(
    name: str, enwik8: Path, wikitext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = {"enwik8": enwik8, "wikitext103": wikitext}[name]
    server = Server(archive.read_bytes())
    try:
        publish(monkeypatch, name, archive, address=server.address)
        first = load_corpus(data(tmp_path, name=name))
        assert first == load_corpus(data(tmp_path, name=name)) == load_corpus(data(tmp_path, name=name, path=archive))
    finally:
        server.stop()
    assert server.asked == [(f"/{archive.name}", "")]
    assert list((tmp_path / "cache").rglob("*.*")) == [tmp_path / "cache" / "downloads" / archive.name]


def test_a_download_that_fails_ends_the_command_with_one_line_that_asks_for_a_copy(
    enwik8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(b"", Answer(status=404))
    try:
        publish(monkeypatch, "enwik8", enwik8, address=server.address)
        run = [str(CONFIG), "--out", str(tmp_path / "out"), "--data.cache_dir", str(tmp_path / "cache")]
        assert main(run) == 1
    finally:
        server.stop()
    line = f"error: enwik8.zip cannot be downloaded: {server.address}/enwik8.zip answers 404 Not Found; or give "
    assert capsys.readouterr().err == f"{line}data.path, your own copy of enwik8\n"
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []
    assert not (tmp_path / "out").exists()


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:200] + bytes([content[200] ^ 255]) + content[201:]


@pytest.mark.parametrize("damage", [cut, flipped, lambda _: b"not a zip at all"], ids=["cut", "flipped", "other"])
def test_a_damaged_archive_is_named(damage: Any, enwik8: Path, tmp_path: Path) -> None:
    enwik8.write_bytes(damage(enwik8.read_bytes()))
    with pytest.raises(CorpusError, match=r"enwik8\.zip is not a whole zip file: .*; delete it and get it again"):
        load_corpus(data(tmp_path, name="enwik8", path=enwik8))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"enwik9": TEXT}, r"enwik8\.zip has 0 files named enwik8; one is expected"),
        ({"enwik8": TEXT, "old/enwik8": TEXT}, r"enwik8\.zip has 2 files named enwik8; one is expected"),
        ({"enwik8": TEXT + b"x"}, rf"enwik8\.zip has {len(TEXT) + 1} bytes in enwik8; {len(TEXT)} are expected"),
        ({"enwik8": TEXT[:-1] + b"x"}, r"enwik8\.zip is not enwik8: it has sha256 .*, expected"),
    ],
    ids=["none", "two", "size", "sum"],
)
def test_an_archive_of_something_else_is_refused(
    files: dict[str, bytes], message: str, enwik8: Path, tmp_path: Path
) -> None:
    zipped(enwik8, files)
    with pytest.raises(CorpusError, match=message):
        load_corpus(data(tmp_path, name="enwik8", path=enwik8))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"given has 0 files named wiki\.train\.tokens; one is expected, anywhere in a folder or a \.zip"),
        (["a/wiki.train.tokens", "b/wiki.train.tokens"], r"given has 2 files named wiki\.train\.tokens"),
        (["wiki.train.tokens"], r"given: wiki\.train\.tokens has 1 lines; that of wikitext103 has 1801350"),
    ],
    ids=["none", "two", "lines"],
)
def test_a_folder_of_something_else_is_refused(files: list[str], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(" = a = \n")
    folder.mkdir(exist_ok=True)
    with pytest.raises(CorpusError, match=message):
        load_corpus(data(tmp_path, name="wikitext103", path=folder))


@pytest.mark.parametrize("path", ["gone", "gone.zip"])
@pytest.mark.parametrize("name", ["enwik8", "wikitext103"])
def test_a_path_that_is_nowhere_is_named(name: str, path: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=rf"{path} cannot be read: No such file"):
        load_corpus(data(tmp_path, name=name, path=tmp_path / path))

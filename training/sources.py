"""The sources of corpora: a file, compressed or not, a folder, or a downloaded archive.

Knows the sizes and checksums of the published corpora, and no splits.
"""

import hashlib
import lzma
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from training.config import DataConfig
from training.download import DownloadError, Remote, download


class CorpusError(ValueError):
    """A corpus that is unavailable or is not the named corpus; the message says what to do."""


@dataclass(frozen=True)
class Member:
    """A file of a published corpus, with its size, number of lines and checksum as far as they are known."""

    name: str
    size: int | None = None  # bytes
    num_lines: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Published:
    """A published corpus: its archive and the files in it."""

    archive: Remote  # a zip
    members: tuple[Member, ...]  # in any folder of the archive


# Sizes and checksums are from public loaders, because the archives could not be fetched where this was written.
# enwik8, text8: dozens of repositories state the sha256 of archive and text; sizes are from Hugging Face's data card of
# enwik8 and TensorFlow's word2vec tutorial. WikiText-103: huggingface/datasets, datasets/wikitext/dataset_infos.json,
# has size and sha256 of the archive and the numbers of lines (torchtext has the same); the authors' host,
# s3.amazonaws.com/research.metamind.io, is gone. Only gluon-nlp has checksums of the .tokens files (sha1), so they have
# none here.
PUBLISHED = {
    "enwik8": Published(
        Remote(
            ("http://mattmahoney.net/dc/enwik8.zip", "https://data.deepai.org/enwik8.zip"),
            size=36_445_475,
            sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        ),
        (
            Member(
                "enwik8", size=100_000_000, sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
            ),
        ),
    ),
    "text8": Published(
        Remote(
            ("http://mattmahoney.net/dc/text8.zip", "https://mattmahoney.net/dc/text8.zip"),
            size=31_344_016,
            sha256="a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        ),
        (Member("text8", size=100_000_000, sha256="6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7"),),
    ),
    "wikitext103": Published(
        Remote(
            ("https://wikitext.smerity.com/wikitext-103-v1.zip",),
            size=190_229_076,
            sha256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        ),
        (
            Member("wiki.train.tokens", num_lines=1_801_350),
            Member("wiki.valid.tokens", num_lines=3_760),
            Member("wiki.test.tokens", num_lines=4_358),
        ),
    ),
}


def read_published(config: DataConfig) -> list[bytes]:
    """The files of the corpus `config.name`: from `config.path`, else downloaded into `config.cache_dir`.

    The path is the archive, a folder with the files at any depth, or the file itself if the corpus has a single file.

    Raises:
        CorpusError: the download fails, or a file is missing or differs from the published file.
    """
    published = PUBLISHED[config.name]
    path = config.path or _downloaded(config)
    texts = []
    for member in published.members:
        text = _read_member(path, member, alone=len(published.members) == 1)
        _check(text, member, name=config.name, path=path)
        texts.append(text)
    return texts


def read_file(path: Path) -> bytes:
    """The bytes of a file, decompressed if its name ends in .xz.

    Raises:
        CorpusError: the file cannot be read, is damaged or is empty.
    """
    try:
        content = path.read_bytes()
        text = lzma.decompress(content) if path.suffix == ".xz" else content
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
    except lzma.LZMAError as error:
        raise CorpusError(f"{path} is not a whole xz file: {error}") from error
    if not text:
        raise CorpusError(f"{path} is empty")
    return text


def _downloaded(config: DataConfig) -> Path:
    try:
        return download(PUBLISHED[config.name].archive, folder=config.cache_dir / "downloads")
    except DownloadError as error:
        raise CorpusError(f"{error}; or give data.path, your own copy of {config.name}") from error


def _read_member(path: Path, member: Member, *, alone: bool) -> bytes:
    if path.suffix == ".zip":
        return _read_zipped(path, member)
    if not path.exists() or (alone and not path.is_dir()):
        return read_file(path)
    found = [file for file in path.rglob(member.name) if file.is_file()]
    _expect_one(len(found), member, path)
    return read_file(found[0])


def _read_zipped(path: Path, member: Member) -> bytes:
    """Read a file of an archive into memory; nothing is unpacked to the disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [entry for entry in archive.infolist() if PurePosixPath(entry.filename).name == member.name]
            _expect_one(len(found), member, path)
            if member.size not in (None, found[0].file_size):
                raise CorpusError(f"{path} has {found[0].file_size} bytes in {member.name}; {member.size} are expected")
            return archive.read(found[0])
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise CorpusError(f"{path} is not a whole zip file: {error}; delete it and get it again") from error


def _expect_one(count: int, member: Member, path: Path) -> None:
    if count != 1:
        raise CorpusError(
            f"{path} has {count} files named {member.name}; one is expected, anywhere in a folder or a .zip"
        )


def _check(text: bytes, member: Member, *, name: str, path: Path) -> None:
    if member.size not in (None, len(text)):
        raise CorpusError(f"{path} has {len(text)} bytes; {name} has {member.size}")
    if member.num_lines is not None and (num_lines := text.count(b"\n")) != member.num_lines:
        raise CorpusError(f"{path}: {member.name} has {num_lines} lines; that of {name} has {member.num_lines}")
    if member.sha256 is not None and (found := hashlib.sha256(text).hexdigest()) != member.sha256:
        raise CorpusError(f"{path} is not {name}: it has sha256 {found}, expected {member.sha256}")

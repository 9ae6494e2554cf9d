"""The bundle: the folder that training writes and that export and the server read.

Owns its four files (model.safetensors, config.json, tokenizer.json, README.md), their checks, and writing them in one
step, so that neither a reader nor a crash leaves half of a bundle. The folder plots/ may lie beside the files: it holds
pictures for the README, which no program reads. Knows no torch: weights are numpy arrays, float32 or float16 on disk.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as parse_tensors
from safetensors.numpy import save as serialize_tensors

from model.config import ModelConfig
from model.folder import replacing
from model.tokenizer import Tokenizer, TokenizerError, load_tokenizer

FORMAT: Literal[1] = 1
WEIGHTS, CONFIG, TOKENIZER, CARD = "model.safetensors", "config.json", "tokenizer.json", "README.md"
PLOTS, PICTURE_SUFFIX = "plots", ".png"
DESCRIPTION = (CONFIG, TOKENIZER, CARD)
_FILES = (WEIGHTS, *DESCRIPTION)
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PICTURE_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NO_PICTURES: Mapping[str, bytes] = {}
_COPY_AGAIN = "copy the bundle again from where it was made"

StoredDtype = Literal["float32", "float16"]


class BundleError(ValueError):
    """A bundle that cannot be read or written; the message names the file and what to do."""


@dataclass(frozen=True)
class Bundle:
    """A folder that passed the checks of `open_bundle` or `inspect_bundle`. `tensors` reads the weights."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    card: str  # markdown
    training: dict[str, Any]  # facts about the training run, in any form
    hash: str  # sha256 of model.safetensors, hex

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Read every weight as a new float32 array, with the names, shapes and order of `config.tensor_shapes()`.

        Raises:
            BundleError: model.safetensors is not whole, does not fit config.json, or was changed after the bundle was
                opened.
        """
        stored = _read_weights(self.path, sha256=self.hash)
        dtype = _check_tensors(stored, config=self.config, where=str(self.path / WEIGHTS))
        _check_weight_facts(self.path, dtype=dtype, num_parameters=self.config.num_parameters)
        return {name: stored[name].astype(np.float32) for name in self.config.tensor_shapes()}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Weights(_Part):
    sha256: str
    dtype: StoredDtype
    num_parameters: int


class _TokenizerFile(_Part):
    sha256: str


class _Manifest(_Part):
    """config.json as a whole."""

    format: Literal[1]
    model: ModelConfig
    weights: _Weights
    tokenizer: _TokenizerFile
    training: dict[str, Any]


def save_bundle(
    path: str | Path,
    *,
    config: ModelConfig,
    tokenizer: Tokenizer,
    tensors: Mapping[str, NDArray[Any]],
    card: str,
    training: Mapping[str, Any],
    pictures: Mapping[str, bytes] = _NO_PICTURES,
) -> None:
    """Write a bundle at `path`; replace a bundle that is there. All checks come before the first byte.

    At any moment `path` holds the whole old bundle or the whole new one (see `model.folder.replacing`).

    Args:
        tensors: all float32 or all float16, named and shaped as `config.tensor_shapes()`.
        card: the README.md, markdown.
        training: facts about the training run, in any form that JSON can hold.
        pictures: PNG files by name; `card` links to them as plots/NAME.png.

    Raises:
        BundleError: tensors, tokenizer and config do not fit together, `training` is not JSON, `card` has no UTF-8
            form, a picture has no plain name or is no PNG, or `path` holds something that is not a bundle.
    """
    target = Path(path).resolve()
    _check_replaceable(target)
    _check_vocabulary(tokenizer, config=config, where="tokenizer")
    dtype = _check_tensors(tensors, config=config, where="tensors")
    facts, markdown = _as_json(training), _as_utf8(card)
    _check_pictures(pictures)
    # safetensors writes the memory of an array as it is, so the array must be contiguous.
    weights = serialize_tensors({name: np.ascontiguousarray(tensors[name]) for name in config.tensor_shapes()})
    with replacing(target) as fresh:
        tokenizer.save(fresh / TOKENIZER)
        manifest = _Manifest(
            format=FORMAT,
            model=config,
            weights=_Weights(sha256=_sha256(weights), dtype=dtype, num_parameters=config.num_parameters),
            tokenizer=_TokenizerFile(sha256=_sha256((fresh / TOKENIZER).read_bytes())),
            training=facts,
        )
        (fresh / WEIGHTS).write_bytes(weights)
        (fresh / CONFIG).write_bytes(json.dumps(manifest.model_dump(mode="json"), indent=2).encode() + b"\n")
        (fresh / CARD).write_bytes(markdown)
        _write_pictures(fresh, pictures)


def open_bundle(path: str | Path) -> Bundle:
    """Check a bundle in full, weights included, and return it.

    Raises:
        BundleError: a file is missing, cut short, changed, of another format, or does not fit the others.
    """
    bundle = inspect_bundle(path)
    bundle.tensors()
    return bundle


def inspect_bundle(path: str | Path) -> Bundle:
    """Check a bundle except the content of its weights, which `Bundle.tensors` checks, and return it.

    Raises:
        BundleError: as for `open_bundle`.
    """
    folder = Path(path)
    _check_present(folder, files=_FILES)
    manifest = _read_manifest(folder)
    config = manifest.model
    num_bytes = (folder / WEIGHTS).stat().st_size
    least = config.num_parameters * np.dtype(manifest.weights.dtype).itemsize
    if num_bytes < least:
        raise BundleError(
            f"{folder / WEIGHTS} is cut short: it has {num_bytes} bytes, its weights alone are {least}; {_COPY_AGAIN}"
        )
    return _describe(folder, manifest)


def open_description(path: str | Path) -> Bundle:
    """Return the model's description from a folder with the files of a bundle; the weights may be missing.

    Its `hash` is that of the weights; do not call its `tensors`.

    Raises:
        BundleError: as for `open_bundle`.
    """
    folder = Path(path)
    _check_present(folder, files=DESCRIPTION)
    return _describe(folder, _read_manifest(folder))


def _describe(folder: Path, manifest: _Manifest) -> Bundle:
    tokenizer = _read_tokenizer(folder, sha256=manifest.tokenizer.sha256)
    _check_vocabulary(tokenizer, config=manifest.model, where=str(folder / TOKENIZER))
    return Bundle(
        path=folder,
        config=manifest.model,
        tokenizer=tokenizer,
        card=_read_text(folder / CARD),
        training=manifest.training,
        hash=manifest.weights.sha256,
    )


def _check_present(folder: Path, *, files: Sequence[str]) -> None:
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise BundleError(f"{folder} {problem}; a bundle is a folder with {', '.join(_FILES)}")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise BundleError(f"{folder} lacks {', '.join(missing)}; a bundle has {', '.join(_FILES)}: {_COPY_AGAIN}")


def _read_manifest(folder: Path) -> _Manifest:
    file = folder / CONFIG
    try:
        document = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise BundleError(f"{file} is not valid JSON ({error}); {_COPY_AGAIN}") from error
    if not isinstance(document, dict):
        raise BundleError(f"{file} must hold a JSON object, not {type(document).__name__}; {_COPY_AGAIN}")
    if document.get("format") != FORMAT:
        raise BundleError(
            f"{file}: format is {document.get('format')!r} and this version reads {FORMAT}; "
            "open the bundle with the version of allattn that wrote it"
        )
    try:
        return _Manifest.model_validate(document)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise BundleError(f"{file}: {faults}; {_COPY_AGAIN}") from error


def _read_weights(folder: Path, *, sha256: str) -> dict[str, NDArray[Any]]:
    file = folder / WEIGHTS
    content = file.read_bytes()
    _check_hash(file, content=content, sha256=sha256)
    try:
        return parse_tensors(content)
    except (SafetensorError, KeyError) as error:  # KeyError: an element type that numpy does not know
        raise BundleError(f"{file} is not a safetensors file of float32 or float16 ({error!r})") from error


def _read_tokenizer(folder: Path, *, sha256: str) -> Tokenizer:
    file = folder / TOKENIZER
    _check_hash(file, content=file.read_bytes(), sha256=sha256)
    try:
        return load_tokenizer(file)
    except TokenizerError as error:
        raise BundleError(str(error)) from error


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{file} is not UTF-8 text ({error}); {_COPY_AGAIN}") from error


def _check_hash(file: Path, *, content: bytes, sha256: str) -> None:
    if (found := _sha256(content)) != sha256:
        raise BundleError(f"{file} was changed or cut short: its sha256 is {found} and not {sha256}; {_COPY_AGAIN}")


def _check_vocabulary(tokenizer: Tokenizer, *, config: ModelConfig, where: str) -> None:
    if tokenizer.vocab_size != config.vocab_size:
        raise BundleError(
            f"{where} has {tokenizer.vocab_size} tokens and the model's vocab_size is {config.vocab_size}; "
            "they must be those the model was trained with"
        )


def _check_tensors(tensors: Mapping[str, NDArray[Any]], *, config: ModelConfig, where: str) -> StoredDtype:
    """Check names, shapes and values of the weights, and return their common dtype."""
    shapes = config.tensor_shapes()
    if missing := shapes.keys() - tensors.keys():
        raise BundleError(f"{where}: missing {', '.join(sorted(missing))}")
    if unexpected := tensors.keys() - shapes.keys():
        raise BundleError(f"{where}: unexpected {', '.join(sorted(unexpected))}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise BundleError(f"{where}: {name} has shape {tensors[name].shape}, the config needs {shape}")
    dtype = _common_dtype({str(tensors[name].dtype) for name in shapes}, where=where)
    for name in shapes:
        if not np.isfinite(tensors[name]).all():
            raise BundleError(f"{where}: {name} holds values that are not finite")
    return dtype


def _common_dtype(dtypes: set[str], *, where: str) -> StoredDtype:
    if dtypes == {"float32"}:
        return "float32"
    if dtypes == {"float16"}:
        return "float16"
    raise BundleError(f"{where}: weights are {', '.join(sorted(dtypes))}; they must all be float32 or all float16")


def _check_weight_facts(folder: Path, *, dtype: StoredDtype, num_parameters: int) -> None:
    facts = _read_manifest(folder).weights
    if (facts.dtype, facts.num_parameters) != (dtype, num_parameters):
        raise BundleError(
            f"{folder / CONFIG}: weights says {facts.num_parameters} parameters of {facts.dtype}, "
            f"{WEIGHTS} has {num_parameters} of {dtype}; {_COPY_AGAIN}"
        )


def _check_replaceable(target: Path) -> None:
    """Check that the target is missing, an empty folder, or a bundle and nothing more. Raises BundleError if not."""
    if not target.exists():
        return
    if not target.is_dir():
        raise BundleError(f"{target} is a file; a bundle is a folder: choose another place")
    held = {entry.name for entry in target.iterdir()}
    files = held - {PLOTS} if _holds_only_pictures(target / PLOTS) else held
    if held and files != set(_FILES):
        raise BundleError(
            f"{target} exists and is not a bundle (it has {', '.join(sorted(held)[:5])}, a bundle has exactly "
            f"{', '.join(_FILES)} and pictures in {PLOTS}/); it was left as it is: choose another place or move it away"
        )


def _holds_only_pictures(folder: Path) -> bool:
    """Return whether a folder holds PNG files and nothing else."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    return all(entry.is_file() and entry.suffix == PICTURE_SUFFIX for entry in folder.iterdir())


def _check_pictures(pictures: Mapping[str, bytes]) -> None:
    for name, content in pictures.items():
        if not _PICTURE_NAME.fullmatch(name):
            raise BundleError(f"pictures: the name {name!r} must be letters, digits, - and _ only")
        if not content.startswith(_PNG_START):
            raise BundleError(f"pictures: {name} is not a PNG file")


def _write_pictures(bundle: Path, pictures: Mapping[str, bytes]) -> None:
    if not pictures:
        return
    folder = bundle / PLOTS
    folder.mkdir()
    for name, content in pictures.items():
        (folder / (name + PICTURE_SUFFIX)).write_bytes(content)


def _as_json(training: Mapping[str, Any]) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(json.dumps(dict(training), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BundleError(f"training cannot be written as JSON: {error}") from error
    return facts


def _as_utf8(card: str) -> bytes:
    try:
        return card.encode()
    except UnicodeEncodeError as error:
        raise BundleError(f"card: character {error.start} is a lone surrogate, which has no UTF-8 form") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

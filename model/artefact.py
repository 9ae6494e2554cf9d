"""The artefact: the folder that holds a bundle's model as frozen graphs. Export writes it, the server reads it.

It has config.json, tokenizer.json and README.md as a bundle has them, the graphs, and manifest.json, which lists every
file with its size and sha256, every input and output, and the layout of the rings. Knows no torch.

There are three graphs. Sizes: B rows, T new tokens, E width, V vocabulary, h heads of a group, S slots of its rings,
H heads, D head size, n positions:

    decode   tokens [B], lengths [B], rings                  -> logits [B, V] and, for each layer, new [B, 1, 2, H, D]
    extend   tokens [B, T], num_new [B], lengths [B], rings  -> hidden [B, T, E], logits [B, V] after the last new token
                                                                of each row, memory_share [B, T, layers], and new
    logits   hidden [n, E]                                   -> logits [n, V]

Graphs change nothing: the owner of the rings writes the keys and values of `new`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from model.backends import ArtefactKind
from model.bundle import DESCRIPTION, Bundle, BundleError, open_description

FORMAT: Literal[1] = 1
MANIFEST = "manifest.json"
MODEL_HASH = "model_hash"  # name of the metadata entry with the hash of the graph's model
RING_LAYOUT = (
    "rings[l][g] is group g of layer l: inputs layer{l}.group{g}.key and .value, each [rows, num_heads, num_slots, "
    "head size]. The token at position p of a row lies in slot p % num_slots; lengths are tokens consumed, never "
    "clipped; slots that nothing was written to must be finite. layer{l}.new is [rows, tokens, key or value, heads, "
    "head size]; the heads of group g come after those of the groups before it."
)
EXPORT_AGAIN = "export the bundle again"

GraphName = Literal["decode", "extend", "logits"]
GRAPHS: tuple[GraphName, ...] = ("decode", "extend", "logits")


class ArtefactError(BundleError):
    """An artefact that cannot be written, read or run; the message names the file and what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileFacts(_Part):
    """The size and hash of a file."""

    num_bytes: int
    sha256: str


class TensorFacts(_Part):
    """An input or output of a graph."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]  # a name stands for a size that may change from call to call


class GraphFacts(_Part):
    """The file of a graph, and its inputs and outputs in order."""

    file: str
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]


class RingFacts(_Part):
    """The rings of one group of heads."""

    num_heads: int
    num_slots: int


class Manifest(_Part):
    """manifest.json as a whole."""

    format: Literal[1]
    kind: ArtefactKind  # the backend that runs the artefact
    weights: str  # number format of the weights: float32, float16, int8 or int4
    dtype: Literal["float32", "float16"]  # number format of rings and hidden states
    device: Literal["cpu", "cuda"] | None  # the device that its graphs were made on and run on; None = any
    model_hash: str  # sha256 of the weights of the bundle
    opset: int | None  # version of the ONNX operators; None = no ONNX artefact
    versions: dict[str, str]  # versions of the packages that wrote the artefact
    graphs: dict[GraphName, GraphFacts]
    ring_layout: str
    rings: tuple[tuple[RingFacts, ...], ...]  # groups of heads, by layer
    spans: tuple[tuple[int, ...], ...]  # reach of each head in tokens, by layer; heads in the order of training
    files: dict[str, FileFacts]  # all files but manifest.json
    verified: dict[str, Any]  # results of replay and scoring beside the bundle's own model

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if missing := [name for name in GRAPHS if name not in self.graphs]:
            raise ValueError(f"graphs lacks {', '.join(missing)}")
        if unlisted := sorted({graph.file for graph in self.graphs.values()} - self.files.keys()):
            raise ValueError(f"files lacks {', '.join(unlisted)}")
        return self


@dataclass(frozen=True)
class Artefact:
    """A folder that passed the checks of `open_artefact` or of `inspect_artefact`."""

    path: Path
    manifest: Manifest
    bundle: Bundle  # the model's description, without weights

    def check_model(self, file: Path, found: str) -> None:
        """Check that a graph is of this model; `found` is the hash in its file. Raises ArtefactError if not."""
        if found != (expected := self.manifest.model_hash):
            raise ArtefactError(
                f"{file} is a graph of the model {found or '(none named)'}, not of {expected}; {EXPORT_AGAIN}"
            )


def is_artefact(path: str | Path) -> bool:
    """Return whether a folder has the manifest of an artefact."""
    return (Path(path) / MANIFEST).exists()


def open_artefact(path: str | Path) -> Artefact:
    """Check every file of an artefact and return it.

    Raises:
        ArtefactError: a file is missing, cut short, changed, of another model or of another format.
        BundleError: config.json, tokenizer.json or README.md is wrong.
    """
    artefact = inspect_artefact(path)
    for name, facts in artefact.manifest.files.items():
        _check_content(artefact.path / name, facts=facts)
    return artefact


def inspect_artefact(path: str | Path) -> Artefact:
    """Check an artefact without reading its graphs, and return it.

    Raises:
        ArtefactError, BundleError: as for `open_artefact`, but a graph that changed and kept its size passes.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    for name, facts in manifest.files.items():
        _check_size(folder / name, facts=facts)
        if name in DESCRIPTION:
            _check_content(folder / name, facts=facts)
    bundle = open_description(folder)
    if bundle.hash != manifest.model_hash:
        raise ArtefactError(
            f"{folder / MANIFEST}: model_hash is {manifest.model_hash}, config.json is of the model {bundle.hash}; "
            f"files of two models lie in one folder: {EXPORT_AGAIN}"
        )
    return Artefact(folder, manifest, bundle)


def write_manifest(folder: Path, *, facts: Mapping[str, Any]) -> Manifest:
    """Write manifest.json, which lists all other files of the folder; `facts` are the other fields of `Manifest`."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.name != MANIFEST)
    files = {name: describe_file(folder / name) for name in names}
    manifest = Manifest(format=FORMAT, ring_layout=RING_LAYOUT, files=files, **facts)
    (folder / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")
    return manifest


def check_replaceable(target: Path) -> None:
    """Check that the target is missing, empty, or an artefact and nothing more. Raises ArtefactError if it is not."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtefactError(f"{target} is a file; an artefact is a folder: choose another place")
    held = {entry.name for entry in target.iterdir()}
    if not held:
        return
    known = {MANIFEST, *_read_manifest(target).files} if MANIFEST in held else set()
    if held - known:
        raise ArtefactError(
            f"{target} exists and is not an artefact (it has {', '.join(sorted(held - known)[:5])}); it was left as it "
            "is: choose another place or move it away"
        )


def describe_file(file: Path) -> FileFacts:
    """Return the size and hash of a file."""
    digest = hashlib.sha256()
    for block in _blocks(file):
        digest.update(block)
    return FileFacts(num_bytes=file.stat().st_size, sha256=digest.hexdigest())


def _read_manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST
    try:
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{file}: {error.strerror}; an artefact is what export.run writes") from error
    except ValueError as error:
        raise ArtefactError(f"{file} is not valid JSON ({error}); {EXPORT_AGAIN}") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ArtefactError(f"{file}: format is {found!r} and this version reads {FORMAT}; {EXPORT_AGAIN}")
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ArtefactError(f"{file}: {faults}; {EXPORT_AGAIN}") from error


def _check_size(file: Path, *, facts: FileFacts) -> None:
    if not file.is_file():
        raise ArtefactError(f"{file} is missing; copy the artefact again, or {EXPORT_AGAIN}")
    if (found := file.stat().st_size) != facts.num_bytes:
        problem = "is cut short" if found < facts.num_bytes else "is too long"
        raise ArtefactError(
            f"{file} {problem}: it has {found} bytes, {MANIFEST} says {facts.num_bytes}; copy the artefact again, or "
            f"{EXPORT_AGAIN}"
        )


def _check_content(file: Path, *, facts: FileFacts) -> None:
    if (digest := describe_file(file).sha256) != facts.sha256:
        raise ArtefactError(
            f"{file} was changed: its sha256 is {digest} and not {facts.sha256}; copy the artefact again, or "
            f"{EXPORT_AGAIN}"
        )


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as source:
        while block := source.read(1 << 20):
            yield block

"""The models that tests run on each backend: the bundles of agreement_bundle and the shipped bundle, exported once."""

import atexit
import tempfile
from functools import cache
from pathlib import Path

import pytest

from export.run import export
from model.artefact import open_artefact
from model.backends import LoadOptions
from model.frozen.baked import bake
from model.frozen.exported import ExportedLM, load_exported
from model.frozen.served import ServedLM
from tests.support.agreement_bundle import build_network, text_of, write_bundle
from tests.support.native_models import small_native

BUNDLE_BACKENDS = ("torch", "native")  # backends that run a bundle itself
BACKENDS = (*BUNDLE_BACKENDS, "torchscript", "onnx")
# writing an ONNX artefact takes 20 s; running it is quick
EACH_BACKEND = (*BUNDLE_BACKENDS, "torchscript", pytest.param("onnx", marks=pytest.mark.slow))
SHIPPED = Path(__file__).parents[2] / "bundles" / "default"
SHIPPED_BYTES = 3000  # of text that both score; few, since it only matters that the export works


@cache
def folder() -> Path:
    """Return the folder of the exported artefacts, which is deleted when the tests end."""
    place = tempfile.TemporaryDirectory(prefix="allattn-artefacts-")
    atexit.register(place.cleanup)
    return Path(place.name)


@cache
def bundle_of(kind: str = "masked") -> Path:
    """Return the path of the bundle."""
    return write_bundle(folder() / kind, kind)


@cache
def text_file(kind: str = "masked") -> Path:
    """Return the path of a file with the text of a bundle."""
    file = folder() / f"{kind}.txt"
    file.write_text(text_of(kind))
    return file


def artefact_of(kind: str = "masked", format: str = "onnx") -> Path:
    """Return the path of the bundle in a format of `export.run`. Copy the artefact before you change it."""
    return _artefact_of(kind, format)


@cache
def _artefact_of(kind: str, format: str) -> Path:
    out = folder() / f"{kind}-{format}"
    export(bundle_of(kind), out, format=format, text=text_file(kind))
    return out


@cache
def model_of(kind: str = "masked", format: str = "onnx") -> ExportedLM:
    """Return the artefact, loaded on the CPU with one thread."""
    return load_exported(open_artefact(artefact_of(kind, format)), LoadOptions(device="cpu", num_threads=1))


@cache
def served_model(kind: str, backend: str) -> ServedLM:
    """Return the model as a backend runs it."""
    if backend == "native":
        return small_native(kind)
    return bake(build_network(kind)) if backend == "torch" else model_of(kind, backend)


def named_backend(backend: str) -> str:
    """Return the value of the setting `backend` that runs the folders of `served_folder` and `shipped_folder`."""
    return backend if backend in BUNDLE_BACKENDS else "auto"


def served_folder(kind: str, backend: str) -> Path:
    """Return the folder that a server is given for a backend or a format of `export.run`."""
    return bundle_of(kind) if backend in BUNDLE_BACKENDS else artefact_of(kind, backend)


@cache
def shipped_folder(backend: str) -> Path:
    """Return the folder that a server is given for the shipped bundle."""
    if backend in BUNDLE_BACKENDS:
        return SHIPPED
    out = folder() / f"shipped-{backend}"
    export(SHIPPED, out, format=backend, num_bytes=SHIPPED_BYTES)
    return out

"""Export a bundle as an artefact that the server runs: `python -m export.run BUNDLE OUT --format onnx`.

An artefact is kept only if it computes what the bundle computes: see export/verify.py.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from export.graph import OPSET, Signature, Steps, signatures
from export.verify import NUM_BYTES, TEXT, Verified, positive, read_text, verify
from model.artefact import ArtefactError, GraphFacts, GraphName, check_replaceable, open_artefact, write_manifest
from model.backends import ArtefactKind, LoadOptions
from model.bundle import DESCRIPTION, Bundle, BundleError, open_bundle
from model.folder import replacing
from model.frozen.baked import BakedLM, load_baked
from model.frozen.exported import load_exported


class Format(NamedTuple):
    """A format that --format accepts."""

    kind: ArtefactKind
    weights: str
    dtype: str = "float32"  # of ring buffers and hidden states
    bits: int | None = None  # of a weight; None = weights are not quantised


FORMATS = {
    "torchscript": Format("torchscript", "float32"),
    "onnx": Format("onnx", "float32"),
    "onnx-fp16": Format("onnx", "float16", dtype="float16"),
    "onnx-int8": Format("onnx", "int8", bits=8),
    "onnx-int4": Format("onnx", "int4", bits=4),
    "pt2": Format("pt2", "float32"),
}
PACKAGES = {"torchscript": ("torch",), "pt2": ("torch",), "onnx": ("torch", "onnx", "onnxscript")}


def main(argv: Sequence[str]) -> int:
    """Export one bundle; return the exit status."""
    asked = _parser().parse_args(argv)
    try:
        export(
            asked.bundle,
            asked.out,
            format=asked.format,
            device=asked.device,
            text=asked.text,
            num_bytes=asked.num_bytes,
        )
    except (BundleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def export(
    bundle_path: Path,
    out: Path,
    *,
    format: str,
    device: Literal["cpu", "cuda"] = "cpu",
    text: Path = TEXT,
    num_bytes: int = NUM_BYTES,
) -> Verified:
    """Write and verify an artefact at `out`, which replaces an artefact that is there.

    Args:
        format: a key of FORMATS.
        device: cpu or cuda. TorchScript and pt2 artefacts run only on the kind of device that they were made on.
        text: a file; the bundle and the artefact both score its first `num_bytes` bytes.

    Raises:
        BundleError: the bundle is incomplete or damaged.
        ArtefactError: `out` holds something else, a package that the format needs is missing, or the artefact does not
            compute what the bundle computes. `out` is unchanged.
    """
    form, target = FORMATS[format], out.resolve()
    if device == "cuda" and not torch.cuda.is_available():
        raise ArtefactError("device = 'cuda', but torch sees no CUDA device; allowed here: cpu")
    check_replaceable(target)
    bundle = open_bundle(bundle_path)
    model = load_baked(bundle, dtype=getattr(torch, form.dtype), device=device)
    read_text(text, bundle.tokenizer, num_bytes=num_bytes)  # an unusable text is reported before the long work
    patience = "" if form.kind == "torchscript" else "; graphs of many layers take minutes"
    print(f"{bundle_path}: {bundle.config.num_parameters / 1e6:.1f} M parameters, as {format}{patience}", flush=True)
    with replacing(target) as fresh:
        for name in DESCRIPTION:
            (fresh / name).write_bytes((bundle.path / name).read_bytes())
        begun, graphs = time.monotonic(), {}
        for graph, described in _write_graphs(form, model, fresh, model_hash=bundle.hash):
            print(f"  {graph:8} {described.file}, {time.monotonic() - begun:.1f} s", flush=True)
            graphs[graph], begun = described, time.monotonic()
        facts = _facts(form, model, bundle, graphs)
        write_manifest(fresh, facts={**facts, "verified": {}})
        exported = load_exported(open_artefact(fresh), LoadOptions(device=device))
        verified = verify(bundle, exported, weights=form.weights, text=text, num_bytes=num_bytes)
        manifest = write_manifest(fresh, facts={**facts, "verified": {"text": text.name, **asdict(verified)}})
    print("  " + str(verified).replace("\n", "\n  "))
    size = sum(file.num_bytes for file in manifest.files.values())
    print(f"{out}: {size / 1e6:.1f} MB; serve it with: python -m server --bundle {out}")
    return verified


def _write_graphs(
    form: Format, model: BakedLM, folder: Path, *, model_hash: str
) -> Iterator[tuple[GraphName, GraphFacts]]:
    """Write all graphs; yield the name and facts of each graph when its file is written."""
    steps, signed = Steps(model).eval(), signatures(model)
    if form.kind == "torchscript":
        from export.to_torchscript import write_torchscript

        yield from write_torchscript(steps, signed, folder, model_hash=model_hash).items()
    elif form.kind == "pt2":
        from export.to_pt2 import write_pt2

        yield from write_pt2(steps, signed, folder, model_hash=model_hash)
    else:
        yield from _write_onnx(form, steps, signed, folder, model_hash=model_hash)


def _write_onnx(
    form: Format, steps: Steps, signed: list[Signature], folder: Path, *, model_hash: str
) -> Iterator[tuple[GraphName, GraphFacts]]:
    try:
        from export.to_onnx import write_onnx

        change = None
        if form.bits is not None:
            from export.quantise import quantised

            change = partial(quantised, bits=form.bits)
    except ImportError as error:
        raise ArtefactError(f"ONNX cannot be written ({error}): pip install 'allattn[export,onnx]'") from error
    yield from write_onnx(steps, signed, folder, model_hash=model_hash, change=change)


def _facts(form: Format, model: BakedLM, bundle: Bundle, graphs: dict[GraphName, GraphFacts]) -> dict[str, Any]:
    """Return the fields of the manifest that do not depend on files."""
    return {
        "kind": form.kind,
        "weights": form.weights,
        "dtype": form.dtype,
        "device": None if form.kind == "onnx" else model.device.type,
        "model_hash": bundle.hash,
        "opset": OPSET if form.kind == "onnx" else None,
        "versions": {name: version(name) for name in ("allattn", *PACKAGES[form.kind])},
        "graphs": graphs,
        "rings": [
            [{"num_heads": group.num_heads, "num_slots": group.num_slots} for group in layer.groups]
            for layer in model.layers
        ],
        "spans": model.spans,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=sys.argv[0] if sys.argv[0].startswith("allattn ") else "python -m export.run",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("bundle", type=Path, help="the folder of the model")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        required=True,
        help="; ".join(
            (
                "onnx-int8 and onnx-int4 keep weights in 8 and 4 bits",
                "onnx-fp16 is for GPUs",
                "pt2 is compiled for this machine",
            )
        ),
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the artefact is made and verified; default: %(default)s",
    )
    parser.add_argument(
        "--text", type=Path, default=TEXT, help="UTF-8 file that bundle and artefact score; default: %(default)s"
    )
    parser.add_argument(
        "--num-bytes", type=positive, default=NUM_BYTES, help="how many bytes of it to score; default: %(default)s"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

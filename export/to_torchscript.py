"""Export to TorchScript: one file with the three graphs as methods that share one set of weights.

torch has deprecated TorchScript in favour of torch.export; it still runs in every libtorch. Only this file and
model/frozen/torch_graphs.py use it.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from export.graph import Signature, Steps
from model.artefact import MODEL_HASH, GraphFacts, GraphName

FILE = "model.pt"


def write_torchscript(
    steps: Steps, signatures: Sequence[Signature], folder: Path, *, model_hash: str
) -> dict[GraphName, GraphFacts]:
    """Trace the graphs, freeze them and write model.pt; returns the facts of each graph."""
    examples = {signature.name: signature.example for signature in signatures}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation, and sizes that a trace might treat as constants
        traced = torch.jit.trace_module(steps, examples, check_trace=False)  # type: ignore[no-untyped-call]
        frozen = torch.jit.freeze(traced.eval(), preserved_attrs=list(examples))
        torch.jit.save(frozen, folder / FILE, _extra_files={MODEL_HASH: model_hash})
    return {signature.name: signature.facts(FILE) for signature in signatures}

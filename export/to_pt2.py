"""Export to pt2: torch.export exports each graph, and AOTInductor compiles it for this machine's kind of processor.

Compiling needs a C++ compiler; running needs only torch.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from export.graph import Graph, Signature, Steps
from model.artefact import MODEL_HASH, ArtefactError, GraphFacts, GraphName

COMPILERS = ("c++", "g++", "clang++")


def write_pt2(
    steps: Steps, signatures: Sequence[Signature], folder: Path, *, model_hash: str
) -> Iterator[tuple[GraphName, GraphFacts]]:
    """Write NAME.pt2 for each graph.

    Yields:
        each graph's name and facts, once it is compiled.

    Raises:
        ArtefactError: there is no compiler.
    """
    if not any(map(shutil.which, COMPILERS)):
        raise ArtefactError(f"format pt2 needs a C++ compiler, one of {', '.join(COMPILERS)}: apt-get install g++")
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    for signature in signatures:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                Graph(steps, signature.name), signature.example, dynamic_shapes=(signature.dynamic,), strict=False
            )
            file = f"{signature.name}.pt2"
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(folder / file),
                inductor_configs={"aot_inductor.metadata": {MODEL_HASH: model_hash}},
            )
        yield signature.name, signature.facts(file)

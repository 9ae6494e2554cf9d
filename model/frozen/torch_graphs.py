"""The backends `torchscript` (one file for all graphs) and `pt2` (a package of AOTInductor code for each graph)."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.artefact import EXPORT_AGAIN, GRAPHS, MODEL_HASH, Artefact, ArtefactError
from model.backends import AUTO, LoadOptions
from model.frozen.served import TORCH_INVARIANT_ROWS


class TorchGraphs:
    """The three graphs of an artefact, each as a function from tensors to tensors."""

    invariant_rows = TORCH_INVARIANT_ROWS

    def __init__(self, run: Mapping[str, Callable[..., Any]], *, device: torch.device) -> None:
        self.device = device
        self._run = run

    def run_decode(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the graph `decode`."""
        outputs: Sequence[Tensor] = self._run["decode"](*inputs)
        return outputs

    def run_extend(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the graph `extend`."""
        outputs: Sequence[Tensor] = self._run["extend"](*inputs)
        return outputs

    def run_logits(self, hidden: Tensor) -> Tensor:
        """Run the graph `logits`."""
        outputs = self._run["logits"](hidden)
        logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
        return logits


def load_script(artefact: Artefact, options: LoadOptions) -> TorchGraphs:
    """Return the graphs of a TorchScript artefact.

    Raises:
        ArtefactError: the file holds no TorchScript graphs, is of another model, or cannot run on the device.
    """
    device = _device(artefact, options)
    file = artefact.path / artefact.manifest.graphs["decode"].file
    said = {MODEL_HASH: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript itself is deprecated
            module = torch.jit.load(file, map_location=device, _extra_files=said)  # type: ignore[no-untyped-call]
        run: dict[str, Callable[..., Any]] = {name: getattr(module, name) for name in GRAPHS}
    except (RuntimeError, ValueError, AttributeError) as error:
        raise _broken(file, error) from error
    found = said[MODEL_HASH]
    artefact.check_model(file, found.decode() if isinstance(found, bytes) else found)
    return TorchGraphs(run, device=device)


def load_packages(artefact: Artefact, options: LoadOptions) -> TorchGraphs:
    """Return the graphs of a pt2 artefact.

    Raises:
        ArtefactError: a file holds no pt2 graph, is of another model, or cannot run on the device.
    """
    device = _device(artefact, options)
    run: dict[str, Callable[..., Any]] = {}
    for name in GRAPHS:
        file = artefact.path / artefact.manifest.graphs[name].file
        try:
            package = torch._inductor.aoti_load_package(str(file))
        except (RuntimeError, OSError, ValueError) as error:
            raise _broken(file, error) from error
        artefact.check_model(file, package.get_metadata().get(MODEL_HASH, ""))
        run[name] = package
    return TorchGraphs(run, device=device)


def _device(artefact: Artefact, options: LoadOptions) -> torch.device:
    """Return the only device that runs the graphs: the one they were made on. Raises ArtefactError if not allowed."""
    made_on = artefact.manifest.device or "cpu"
    if options.device not in (AUTO, made_on):
        raise ArtefactError(
            f"device = {options.device!r}, but {artefact.path} was made on {made_on!r}; "
            f"export with --device {options.device}"
        )
    if made_on == "cuda" and not torch.cuda.is_available():
        raise ArtefactError(
            f"{artefact.path} was made on 'cuda', and torch sees no CUDA device; export with --device cpu"
        )
    return torch.device(made_on)


def _broken(file: Path, error: Exception) -> ArtefactError:
    why = str(error).strip().splitlines()[0]
    return ArtefactError(f"{file} cannot be loaded by torch {torch.__version__}: {why}; {EXPORT_AGAIN}")

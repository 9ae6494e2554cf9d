"""The backend `onnx`. ONNX Runtime reads and writes torch's tensors in place: nothing is copied.

This is the only file that imports onnxruntime; the package onnxruntime-gpu has the same import name.
"""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from model.artefact import EXPORT_AGAIN, GRAPHS, MODEL_HASH, Artefact, ArtefactError, GraphFacts, GraphName
from model.backends import LoadOptions

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64}
NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}
TWINS = ("onnxruntime", "onnxruntime-gpu")  # packages that install the same files


class OnnxGraphs:
    """The three graphs of an artefact, each in its own session of ONNX Runtime."""

    invariant_rows = 2  # measured: fp32 and int8 give equal bits from 2 to 33 rows; a single row has its own kernels

    def __init__(self, artefact: Artefact, options: LoadOptions) -> None:
        """Load an artefact. Raises ArtefactError if a graph is wrong or the provider is missing."""
        check_packages()
        provider = choose_provider(device=options.device, provider=options.provider)
        threads = options.num_threads or torch.get_num_threads()
        self.device = torch.device(provider)
        self._graphs = {
            name: _Graph(artefact, name, provider=provider, num_threads=threads, device=self.device) for name in GRAPHS
        }

    def run_decode(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the graph `decode`. The rings (all inputs after the first two) stay bound from step to step."""
        return self._graphs["decode"].run(inputs, num_changing=2)

    def run_extend(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the graph `extend`."""
        return self._graphs["extend"].run(inputs)

    def run_logits(self, hidden: Tensor) -> Tensor:
        """Run the graph `logits`."""
        return self._graphs["logits"].run([hidden.contiguous()])[0]


class _Graph:
    """One graph: its session, and the bindings that calls share."""

    def __init__(
        self, artefact: Artefact, name: GraphName, *, provider: str, num_threads: int, device: torch.device
    ) -> None:
        self._facts: GraphFacts = artefact.manifest.graphs[name]
        self._device = device
        file = artefact.path / self._facts.file
        self._session = _open_session(file, provider=provider, num_threads=num_threads)
        artefact.check_model(file, self._session.get_modelmeta().custom_metadata_map.get(MODEL_HASH, ""))
        self._bindings: dict[tuple[int, ...], ort.IOBinding] = {}

    def run(self, inputs: Sequence[Tensor], *, num_changing: int | None = None) -> list[Tensor]:
        """Run the graph and return its outputs, which are new tensors.

        Args:
            inputs: in the order of the manifest, each contiguous.
            num_changing: the number of first inputs that change from call to call; None = all of them. The others
                stay bound as long as they are the same memory.
        """
        num_changing = len(inputs) if num_changing is None else num_changing
        staying = inputs[num_changing:]
        sizes = {"rows": len(inputs[0]), "new": inputs[0].shape[-1], "positions": len(inputs[0])}
        key = (sizes["rows"], *(tensor.data_ptr() for tensor in staying))
        binding = self._bindings.get(key) if staying else None
        if binding is None:
            binding = self._session.io_binding()
            for facts, tensor in zip(self._facts.inputs[num_changing:], staying, strict=True):
                self._bind(binding.bind_input, facts.name, tensor)
            if staying:
                self._bindings[key] = binding
        for facts, tensor in zip(self._facts.inputs, inputs[:num_changing], strict=False):
            self._bind(binding.bind_input, facts.name, tensor)
        outputs = []
        for facts in self._facts.outputs:
            shape = [sizes[size] if isinstance(size, str) else size for size in facts.shape]
            outputs.append(torch.empty(shape, dtype=DTYPES[facts.dtype], device=self._device))
            self._bind(binding.bind_output, facts.name, outputs[-1])
        if self._device.type == "cuda":  # the session waits for its own stream, but not for torch's
            torch.cuda.current_stream().synchronize()
        self._session.run_with_iobinding(binding)
        return outputs

    def _bind(self, bind: object, name: str, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        bind(name, self._device.type, self._device.index or 0, NUMPY[tensor.dtype], tensor.shape, tensor.data_ptr())  # type: ignore[operator]


def check_packages() -> None:
    """Check that at most one of the two packages is installed, since they share files. Raises ArtefactError."""
    present = [name for name in TWINS if _is_installed(name)]
    if len(present) > 1:
        raise ArtefactError(
            f"{' and '.join(present)} are both installed and overwrite each other's files; "
            f"pip uninstall -y {' '.join(present)}, then install one of them"
        )


def choose_provider(*, device: str, provider: str) -> str:
    """Return `cpu` or `cuda`, as asked; `auto` takes CUDA if there is any.

    Args:
        device: auto, cpu or cuda, the device of the rings and of drawing.
        provider: auto, cpu or cuda; must not contradict `device`.

    Raises:
        ArtefactError: the two contradict each other, or CUDA is asked for and missing.
    """
    if "auto" not in (device, provider) and device != provider:
        raise ArtefactError(f"provider = {provider!r} contradicts device = {device!r}; let one of them be auto")
    asked = device if provider == "auto" else provider
    has_provider, has_device = PROVIDERS["cuda"] in ort.get_available_providers(), torch.cuda.is_available()
    if asked == "auto":
        return "cuda" if has_provider and has_device else "cpu"
    if asked == "cuda" and not (has_provider and has_device):
        lack = (
            "torch sees no CUDA device" if has_provider else f"onnxruntime {ort.__version__} here has no CUDA provider"
        )
        raise ArtefactError(f"provider = 'cuda', but {lack}; allowed here: auto, cpu")
    return asked


def _open_session(file: Path, *, provider: str, num_threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3  # log errors only: failures raise exceptions
    # Spinning threads would take the cores that drawing and the API process need between steps.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(file, options, providers=[PROVIDERS[provider]])
    except Exception as error:  # exceptions of ONNX Runtime have no base class of their own
        why = str(error).strip().splitlines()[0]
        raise ArtefactError(
            f"{file} cannot be loaded by onnxruntime {ort.__version__}: {why}; {EXPORT_AGAIN}"
        ) from error
    # If the CUDA provider cannot be loaded, onnxruntime logs that and takes another provider.
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise ArtefactError(
            f"provider = {provider!r}, but onnxruntime {ort.__version__} could only take {session.get_providers()[0]}: "
            "its CUDA provider needs the CUDA and cuDNN libraries of its version (its log says which are missing)"
        )
    return session


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True

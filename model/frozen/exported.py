"""The model of an artefact: it has the steps of `BakedLM`, and the artefact's graphs compute them from the rings.

Sizes: B rows, T new tokens, E width, H heads, h heads of a group, S slots, D head size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.artefact import Artefact, ArtefactError, Manifest, RingFacts
from model.backends import AUTO, BACKENDS, LoadOptions
from model.config import ModelConfig
from model.frozen.cache import RingCache
from model.spans import HeadGroup

DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Graphs(Protocol):
    """The three graphs of an artefact, ready to run; model/artefact.py lists their inputs and outputs in order.

    Inputs and outputs are on one device. The outputs are new tensors: no later call changes them.
    """

    @property
    def invariant_rows(self) -> int:
        """As `ServedLM.invariant_rows`."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of inputs and outputs."""
        ...

    def run_decode(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the graph `decode`; calls with the same number of rows pass the same tensors as rings."""
        ...

    def run_extend(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the graph `extend`."""
        ...

    def run_logits(self, hidden: Tensor) -> Tensor:
        """Run the graph `logits`."""
        ...


class ExportedLM:
    """A `ServedLM` that the graphs of an artefact compute."""

    def __init__(self, config: ModelConfig, manifest: Manifest, graphs: Graphs) -> None:
        self.config = config
        self.spans = [list(layer) for layer in manifest.spans]
        self.backend = manifest.kind
        self.weights = manifest.weights
        self.invariant_rows = graphs.invariant_rows
        self.device = graphs.device
        self.dtype = DTYPES[manifest.dtype]
        self._graphs = graphs
        self._groups = [list(_groups(layer)) for layer in manifest.rings]

    def allocate(self, num_rows: int) -> RingCache:
        """Return empty rings for `num_rows` streams."""
        head_size = self.config.head_size
        return RingCache(self._groups, num_rows=num_rows, head_size=head_size, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: RingCache) -> tuple[Tensor, list[Tensor]]:
        """Compute one step, as `BakedLM.decode` does."""
        lengths = self._to_device(cache.lengths[: len(tokens)])
        rings = _flat(cache.some_rows(range(len(tokens))))
        logits, *new = self._graphs.run_decode([tokens.contiguous(), lengths, *rings])
        return logits, new

    @torch.inference_mode()
    def extend(self, tokens: Tensor, cache: RingCache, rows: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Compute many tokens of some rows, as `BakedLM.extend` does."""
        hidden, new, _ = self.extend_with_memory_share(tokens, cache, rows)
        return hidden, new

    @torch.inference_mode()
    def extend_with_memory_share(
        self, tokens: Tensor, cache: RingCache, rows: Sequence[int]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Do `extend` and return the shares of persistent vectors, as `BakedLM.extend_with_memory_share` does."""
        hidden, _, memory_share, *new = self._run_extend(tokens, cache, rows, [tokens.shape[1]] * len(rows))
        return hidden, new, memory_share

    @torch.inference_mode()
    def last_logits(self, tokens: Tensor, cache: RingCache, rows: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Return the logits [B, V] fp32 after the first `counts` [B] of each row's tokens [B, T].

        The server does not call this: it computes logits from hidden states.
        """
        return self._run_extend(tokens, cache, rows, counts)[1]

    def _run_extend(
        self, tokens: Tensor, cache: RingCache, rows: Sequence[int], counts: Sequence[int]
    ) -> Sequence[Tensor]:
        rows = list(rows)
        lengths, num_new = self._to_device(cache.lengths[rows]), self._to_device(np.array(counts, dtype=np.int64))
        return self._graphs.run_extend([tokens.contiguous(), num_new, lengths, *_flat(cache.some_rows(rows))])

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [n, V] fp32 of hidden states [n, E], as `BakedLM.logits` does."""
        return self._graphs.run_logits(hidden)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


class LoadGraphs(Protocol):
    """The type of the function that loads the graphs of an artefact for a backend."""

    def __call__(self, artefact: Artefact, options: LoadOptions) -> Graphs:
        """Return the graphs. Raises ArtefactError if a graph is wrong, or cannot run as the options say."""
        ...


def load_exported(artefact: Artefact, options: LoadOptions) -> ExportedLM:
    """Return the model of an artefact; the backend that the artefact was made for computes it.

    Raises:
        ArtefactError: a graph cannot be loaded, or cannot run as the options say.
    """
    backend = BACKENDS[artefact.manifest.kind]
    if options.provider != AUTO and not backend.has_providers:
        raise ArtefactError(
            f"provider = {options.provider!r} is for ONNX artefacts; {artefact.path} is {artefact.manifest.kind}"
        )
    try:
        load: LoadGraphs = backend.import_loader()
    except ImportError as error:
        if not backend.package:
            raise
        raise ArtefactError(
            f"{artefact.path} is an artefact for {backend.name}, and {backend.package} cannot be imported ({error}); "
            f"pip install 'allattn[{backend.extra}]'"
        ) from error
    return ExportedLM(artefact.bundle.config, artefact.manifest, load(artefact, options))


def _groups(layer: Sequence[RingFacts]) -> Iterator[HeadGroup]:
    first = 0
    for group in layer:
        yield HeadGroup(first, group.num_heads, group.num_slots)
        first += group.num_heads


def _flat(rings: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[Tensor]:
    return [half for layer in rings for pair in layer for half in pair]

"""The only torch in the server: a baked model and its rings behind the protocol that the engine drives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from model.baked import BakedLM, bake
from model.bundle import open_bundle
from model.network import AllAttentionLM
from model.sampling import Draws, draw, target_logprobs
from server.messages import Sampling
from server.sequence import Chunk, ChunkResult, Draw

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TorchRunner:
    """Runs a baked model eagerly. Rows are lanes of one `RingCache`; decoding touches rows 0 .. the highest in use."""

    def __init__(self, model: BakedLM, *, num_rows: int) -> None:
        self.num_rows = num_rows
        self.model = model
        self.cache = model.allocate(num_rows)
        self._prepared: tuple[list[Sampling], Draws] | None = None

    @classmethod
    def from_bundle(
        cls, path: Path, *, num_rows: int, dtype: str = "float32", device: str = "auto", num_threads: int | None = None
    ) -> Self:
        """Load a bundle.

        Args:
            dtype: float32 or bfloat16, of weights and rings.
            device: auto, cpu or cuda; auto takes a GPU where there is one.
            num_threads: CPU threads; None = as many as cores.

        Raises:
            BundleError: the bundle is not whole.
            ValueError: CUDA is asked for where there is none.
        """
        if num_threads:
            torch.set_num_threads(num_threads)
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device = 'cuda', but torch sees no CUDA device; allowed here: auto, cpu")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        bundle = open_bundle(path)
        network = AllAttentionLM(bundle.config)
        network.load_state_dict({name: torch.from_numpy(array) for name, array in bundle.tensors().items()})
        return cls(bake(network, dtype=DTYPES[dtype]).to(device), num_rows=num_rows)

    @property
    def device(self) -> str:
        """Where the model runs."""
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        """What weights and rings are kept in."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def state_bytes_per_row(self) -> int:
        """Bytes a live stream costs, whatever its length."""
        return self.cache.bytes_per_row

    @property
    def spans(self) -> tuple[tuple[int, ...], ...]:
        """How far each head of each layer looks back, in tokens."""
        return tuple(map(tuple, self.model.spans))

    def reset(self, row: int) -> None:
        """Begin a fresh stream in a row."""
        self.cache.reset(row)

    def move(self, source: int, target: int) -> None:
        """Copy a row's whole state over another row's."""
        self.cache.move(source, target)

    @torch.inference_mode()
    def extend(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        """Read stretches of prompts and documents, one a row; draw or score where a chunk asks for it."""
        rows = [chunk.row for chunk in chunks]
        counts = [len(chunk.tokens) for chunk in chunks]
        tokens = np.zeros((len(chunks), max(counts)), dtype=np.int64)
        for line, chunk in zip(tokens, chunks, strict=True):
            line[: len(chunk.tokens)] = chunk.tokens
        hidden, new = self.model.extend(self._to_device(tokens), self.cache, rows)
        self.cache.commit(rows, new, counts)
        drawn = self._draw_ends(chunks, hidden)
        return [
            self._score(chunk, hidden[i, : counts[i]]) if chunk.targets is not None else drawn.get(i, ChunkResult())
            for i, chunk in enumerate(chunks)
        ]

    @torch.inference_mode()
    def decode(
        self, rows: Sequence[int], tokens: Sequence[int], draws: Sequence[Draw]
    ) -> tuple[list[int], list[float]]:
        """One step of the rows that generate: feed each its last token, draw the next.

        Returns:
            tokens and their log-probabilities, in the order of `rows`.
        """
        width = max(rows) + 1
        fed = np.zeros(width, dtype=np.int64)
        fed[list(rows)] = tokens
        num_new = np.zeros(width, dtype=np.int64)
        num_new[list(rows)] = 1
        hidden, new = self.model.decode(self._to_device(fed), self.cache)
        self.cache.commit(range(width), new, num_new.tolist())
        if list(rows) != list(range(width)):
            hidden = hidden[list(rows)]
        drawn, logprobs = self._draw(hidden, draws)
        return drawn.tolist(), logprobs.tolist()

    def _draw(self, hidden: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        samplings = [one.sampling for one in draws]
        if self._prepared is None or not _same(self._prepared[0], samplings):
            self._prepared = samplings, self._prepare(samplings)
        return draw(self.model.logits(hidden), self._prepared[1], [one.position for one in draws])

    def _prepare(self, samplings: Sequence[Sampling]) -> Draws:
        return Draws(
            temperatures=[one.temperature for one in samplings],
            top_ks=[one.top_k for one in samplings],
            top_ps=[one.top_p for one in samplings],
            min_ps=[one.min_p for one in samplings],
            seeds=[one.seed for one in samplings],
            device=self.model.device,
        )

    def _draw_ends(self, chunks: Sequence[Chunk], hidden: Tensor) -> dict[int, ChunkResult]:
        """The first tokens of the sequences whose prompts end with these chunks, by index of the chunk."""
        ends = [(i, chunk.draw) for i, chunk in enumerate(chunks) if chunk.draw is not None]
        if not ends:
            return {}
        last = torch.stack([hidden[i, len(chunks[i].tokens) - 1] for i, _ in ends])
        logits = self.model.logits(last)
        draws = [one for _, one in ends]
        tokens, logprobs = draw(logits, self._prepare([one.sampling for one in draws]), [one.position for one in draws])
        results = zip(ends, tokens.tolist(), logprobs.tolist(), strict=True)
        return {i: ChunkResult(token=token, logprob=logprob) for (i, _), token, logprob in results}

    def _score(self, chunk: Chunk, hidden: Tensor) -> ChunkResult:
        assert chunk.targets is not None
        targets = self._to_device(chunk.targets.astype(np.int64))
        logprobs, ranks = target_logprobs(self.model.logits(hidden), targets)
        return ChunkResult(logprobs=logprobs.cpu().numpy(), ranks=ranks.cpu().numpy())

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.model.device)


def _same(left: Sequence[Sampling], right: Sequence[Sampling]) -> bool:
    """Whether both hold the very same objects, which is what one batch composition over many steps means."""
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))

"""What serving and scoring need of a model, whether torch computes its layers one by one or an artefact whole graphs.

Sizes: B rows, T new tokens, E width, H heads, D head size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.frozen.cache import RingCache
from model.sampling.draw import BYTES_TO_SCORE, TokenScores, join_scored, lines_at_once, score_targets

# MKL and oneDNN, fp32: from 4 to 128 rows all were equal bit for bit.
TORCH_INVARIANT_ROWS = 4
SCORED_AT_ONCE = 4  # positions at least: fewer would make matrix products sum in another order


class ServedLM(Protocol):
    """A frozen model and its two steps. A step changes nothing: the owner of the cache commits what it returns."""

    @property
    def config(self) -> ModelConfig:
        """Of the network."""
        ...

    @property
    def spans(self) -> list[list[int]]:
        """For each layer, the reach of each head in the order of training, in tokens."""
        ...

    @property
    def backend(self) -> str:
        """The name of the backend that computes it."""
        ...

    @property
    def weights(self) -> str:
        """How they are kept: float32, bfloat16, float16, int8 or int4."""
        ...

    @property
    def invariant_rows(self) -> int:
        """From so many rows on, `decode` on a CPU gives each row bit for bit what it gives it among more.

        Below, products of matrices sum in another order, so never computing fewer makes a request's numbers
        independent of its neighbours.
        """
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of rings and hidden states."""
        ...

    def allocate(self, num_rows: int) -> RingCache:
        """Rings for a number of live streams, all fresh."""
        ...

    def decode(self, tokens: Tensor, cache: RingCache) -> tuple[Tensor, list[Tensor]]:
        """One new token [B] of each of the first rows: logits [B, V] fp32 and, per layer, pairs [B, 1, 2, H, D]."""
        ...

    def extend(self, tokens: Tensor, cache: RingCache, rows: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """New tokens [B, T] of some rows: hidden states [B, T, E] and, per layer, pairs [B, T, 2, H, D]."""
        ...

    def extend_with_memory_share(
        self, tokens: Tensor, cache: RingCache, rows: Sequence[int]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """`extend`, and the share of attention on persistent vectors, heads' mean, [B, T, layers] fp32."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token in fp32, [n, E] -> [n, V]."""
        ...


@runtime_checkable
class ScoresInside(Protocol):
    """A model whose own step scores tokens."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token in fp32, [n, E] -> [n, V]."""
        ...

    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [n] fp32 and ranks [n] int64 of given tokens [n], from hidden states [n, E]."""
        ...


@torch.inference_mode()
def score_positions(
    model: ServedLM, hidden: Tensor, targets: Tensor, *, num_top: int = 0, entropy: bool = False
) -> TokenScores:
    """`score_targets` from hidden states, a few positions at a time, so that memory is bounded for any vocabulary.

    Args:
        hidden: [T, E].
        targets: [n] int64, n <= T; the positions after them are padding.
    """
    size = lines_at_once(
        model.config.vocab_size, bytes_per_score=BYTES_TO_SCORE, device=model.device, least=SCORED_AT_ONCE
    )
    if isinstance(model, ScoresInside) and len(targets):
        return _score_inside(model, hidden[: len(targets)], targets, num_top=num_top, entropy=entropy, size=size)
    parts = []
    for start in range(0, max(1, len(targets)), size):
        some = targets[start : start + size]
        logits = model.logits(hidden[start : start + size])[: len(some)]
        parts.append(score_targets(logits, some, num_top=num_top, entropy=entropy))
    return join_scored(parts)


def _score_inside(
    model: ScoresInside, hidden: Tensor, targets: Tensor, *, num_top: int, entropy: bool, size: int
) -> TokenScores:
    """Take log-probabilities and ranks from the model's own step, and the rest, if asked for, from its logits."""
    logprobs, ranks = model.score(hidden, targets)
    if not num_top and not entropy:
        return TokenScores(logprobs, ranks, None, None, None)
    parts = [
        score_targets(
            model.logits(hidden[start : start + size]), targets[start : start + size], num_top=num_top, entropy=entropy
        )
        for start in range(0, len(targets), size)
    ]
    return join_scored(parts)._replace(logprobs=logprobs, ranks=ranks)


def score_document(
    model: ServedLM, tokens: np.ndarray, *, chunk_tokens: int = 256
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Score every token after the first in one exact pass at constant memory, whatever the length.

    Args:
        tokens: [n] integers.

    Yields:
        log-probabilities (nats, float32) and ranks (int64, 0 = the most probable) of the next tokens, chunk by chunk.
    """
    cache = model.allocate(1)
    for start in range(0, len(tokens) - 1, chunk_tokens):
        stretch = torch.from_numpy(tokens[start : start + chunk_tokens + 1].astype(np.int64)).to(model.device)
        hidden, new = model.extend(stretch[None, :-1], cache, [0])
        cache.commit([0], new, [len(stretch) - 1])
        scored = score_positions(model, hidden[0], stretch[1:])
        yield scored.logprobs.cpu().numpy(), scored.ranks.cpu().numpy()

"""The interface of a frozen model, which every backend implements, and scoring with it.

Sizes: B rows, T new tokens, E width, H heads, D head size, V vocabulary. A pair is a key and a value.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.frozen.cache import RingCache
from model.sampling.draw import BYTES_TO_SCORE, TokenScores, join_scored, lines_at_once, score_targets

# Measured with MKL and oneDNN in fp32: a row has the same bits among 4 rows as among any number up to 128.
TORCH_INVARIANT_ROWS = 4
SCORED_AT_ONCE = 4  # the least number of positions: with fewer, matrix products sum in another order


class ServedLM(Protocol):
    """A frozen model and its two steps. A step changes nothing: the owner of the cache commits the keys and values."""

    @property
    def config(self) -> ModelConfig:
        """The configuration of the network."""
        ...

    @property
    def spans(self) -> list[list[int]]:
        """The reach of each head, in tokens, by layer; heads are in the order of training."""
        ...

    @property
    def backend(self) -> str:
        """The name of the backend that computes the model."""
        ...

    @property
    def weights(self) -> str:
        """The number format of the weights: float32, bfloat16, float16, int8 or int4."""
        ...

    @property
    def invariant_rows(self) -> int:
        """The number of rows from which on `decode` on a CPU gives a row the same bits among any number of rows.

        With fewer rows, matrix products sum in another order. A caller that never computes fewer rows makes the
        numbers of a request independent of the other requests.
        """
        ...

    @property
    def device(self) -> torch.device:
        """The device that computes the model."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The number format of rings and hidden states."""
        ...

    def allocate(self, num_rows: int) -> RingCache:
        """Return empty rings for `num_rows` streams."""
        ...

    def decode(self, tokens: Tensor, cache: RingCache) -> tuple[Tensor, list[Tensor]]:
        """Return logits [B, V] fp32 after one new token [B] of each first row, and pairs [B, 1, 2, H, D] by layer."""
        ...

    def extend(self, tokens: Tensor, cache: RingCache, rows: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Return hidden states [B, T, E] of new tokens [B, T] of some rows, and pairs [B, T, 2, H, D] by layer."""
        ...

    def extend_with_memory_share(
        self, tokens: Tensor, cache: RingCache, rows: Sequence[int]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Do `extend`; also return the heads' mean share of attention on persistent vectors, [B, T, layers] fp32."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [n, V] fp32 of hidden states [n, E]."""
        ...


@runtime_checkable
class ScoresInside(Protocol):
    """A model that scores tokens inside its own step."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [n, V] fp32 of hidden states [n, E]."""
        ...

    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities [n] fp32 and ranks [n] int64 of targets [n], from hidden states [n, E]."""
        ...


@torch.inference_mode()
def score_positions(
    model: ServedLM, hidden: Tensor, targets: Tensor, *, num_top: int = 0, entropy: bool = False
) -> TokenScores:
    """Return the scores of targets, computed for a few positions at a time: memory is bounded for any vocabulary.

    Args:
        hidden: [T, E].
        targets: [n] int64, n <= T; positions from n on are padding.
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
    """Return log-probabilities and ranks from the model's own step; top tokens and entropies, if asked, from logits."""
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
    """Score every token after the first, in one exact pass and in constant memory for any length.

    Args:
        tokens: [n] integers.

    Yields:
        for each chunk log-probabilities (nats, float32) and ranks (int64, 0 = the most probable) of its next tokens.
    """
    cache = model.allocate(1)
    for start in range(0, len(tokens) - 1, chunk_tokens):
        stretch = torch.from_numpy(tokens[start : start + chunk_tokens + 1].astype(np.int64)).to(model.device)
        hidden, new = model.extend(stretch[None, :-1], cache, [0])
        cache.commit([0], new, [len(stretch) - 1])
        scored = score_positions(model, hidden[0], stretch[1:])
        yield scored.logprobs.cpu().numpy(), scored.ranks.cpu().numpy()

"""The network as it is trained: attention over cached hidden states, with spans and persistent vectors that learn.

Sizes: B streams, M tokens of a block, E width, H heads, D head size, N persistent vectors, L maximum span, S reach, V
vocabulary. Knows no optimizer and no data; `model.baked` turns it into what is served.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Block, banded_attention
from model.config import ModelConfig

CHUNK = 64  # queries that attend together: a wide band wastes products, a narrow one wastes launches
REACH_STEP = 32  # reaches are rounded up to this, so that shapes change seldom while spans learn


class StreamCache(NamedTuple):
    """What earlier blocks leave behind for the next one; carries no gradient."""

    hidden: tuple[Tensor, ...]  # [B, L, E] for each layer: its inputs, newest last, zero where the stream had not begun
    filled: Tensor  # [B] int64 on the CPU: how many of the L positions exist

    def reset(self, streams: Tensor) -> "StreamCache":
        """Forget the past of the streams where `streams` [B] (bool) is true."""
        if not streams.any():
            return self
        hidden = tuple(h.masked_fill(streams.to(h.device)[:, None, None], 0.0) for h in self.hidden)
        return StreamCache(hidden, self.filled.masked_fill(streams, 0))


class PersistentAttention(nn.Module):
    """One layer: heads that attend to the past and to their own persistent vectors, then a post-norm residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, heads, head, pairs = (
            config.width,
            config.num_heads,
            config.head_size,
            config.num_persistent,
        )
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.persistent_key = nn.Parameter(torch.randn(heads, pairs, head) / math.sqrt(head))
        self.persistent_value = nn.Parameter(torch.randn(heads, pairs, head) / math.sqrt(pairs))
        self.span = nn.Parameter(torch.full((heads,), config.span_init))
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor, past: Tensor, position: Tensor, *, filled: Tensor | None) -> Tensor:
        """Map the layer's inputs [B, M, E] to its outputs [B, M, E].

        Args:
            past: [B, S, E], inputs of this layer at the S positions before the block; S = reach of the widest head.
            position: [D, S], column s for distance S - s.
            filled: [B], how many of the S positions exist; None if all do.
        """
        config = self.config
        context = torch.cat((past, hidden), 1)  # [B, S + M, E]
        query = self._heads(self.query(hidden)) / math.sqrt(config.head_size)  # [H, B, M, D]
        key = self._heads(self.key(context))  # [H, B, S + M, D]
        value = self._heads(self.value(context))
        persistent = Block(
            (self.persistent_key * math.sqrt(config.head_size)).to(key.dtype),
            (self.persistent_value * math.sqrt(config.num_persistent)).to(key.dtype),
        )
        mass = span_mask(self.span, num_slots=past.shape[1], config=config).flip(-1)  # [H, S], by key
        outputs = []
        for start in range(0, hidden.shape[1], CHUNK):
            stop = min(start + CHUNK, hidden.shape[1])
            window = slice(start, past.shape[1] + stop)
            outputs.append(
                banded_attention(
                    query[:, :, start:stop],
                    key[:, :, window],
                    value[:, :, window],
                    persistent,
                    position=position,
                    mass=mass,
                    filled=None if filled is None else filled + start,
                    dropout=config.dropout if self.training else 0.0,
                )
            )
        attended = torch.cat(outputs, 2).permute(1, 2, 0, 3).flatten(2)  # [B, M, E]
        output: Tensor = self.norm(hidden + self.out(attended.to(hidden.dtype)))
        return output

    def _heads(self, projected: Tensor) -> Tensor:
        """[B, T, E] -> [H, B, T, D]"""
        rows, num_new, _ = projected.shape
        return projected.view(rows, num_new, self.config.num_heads, -1).permute(2, 0, 1, 3).contiguous()


class AllAttentionLM(nn.Module):
    """An all-attention language model in training form (arXiv 1907.01470).

    Raises:
        ValueError: the configuration asks for adaptive embeddings, which are not trained by this version.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.embedding != "plain":
            raise ValueError(f"embedding = {config.embedding!r} cannot be trained by this version; allowed: 'plain'")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.randn(config.head_size, config.max_span))
        self.layers: list[PersistentAttention] = nn.ModuleList(  # type: ignore[assignment]
            PersistentAttention(config) for _ in range(config.num_layers)
        )
        self.output = nn.Linear(config.width, config.vocab_size)

    def init_cache(self, num_streams: int) -> StreamCache:
        """The cache of streams that have not begun."""
        config = self.config
        empty = self.position.new_zeros(num_streams, config.max_span, config.width)
        return StreamCache((empty,) * config.num_layers, torch.zeros(num_streams, dtype=torch.int64))

    def forward(self, tokens: Tensor, cache: StreamCache) -> tuple[Tensor, StreamCache]:
        """Read one block of every stream.

        Args:
            tokens: [B, M] int64, the block that follows what the cache has seen.

        Returns:
            hidden states [B, M, E] for `logits`, and the cache of the next block.
        """
        config = self.config
        hidden = self.embedding(tokens)
        hidden = F.dropout(hidden, config.embedding_dropout, self.training)
        table = self.position.flip(-1)  # [D, L], farthest first, as the keys are
        kept = []
        for layer, past, reach in zip(self.layers, cache.hidden, self.reaches(), strict=True):
            kept.append(torch.cat((past, hidden.detach()), 1)[:, -config.max_span :])
            start = config.max_span - reach
            hidden = layer(
                hidden,
                past[:, start:],
                table[:, start:],
                filled=_unless_all(cache.filled, reach, config.empty_slots),
            )
        filled = (cache.filled + tokens.shape[1]).clamp(max=config.max_span)
        return hidden, StreamCache(tuple(kept), filled)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, [..., E] -> [..., V]."""
        scores: Tensor = self.output(hidden)
        return scores

    def reaches(self) -> list[int]:
        """For each layer, a distance beyond which no head's mask, nor its gradient, differs from zero."""
        config = self.config
        widest = torch.stack([layer.span.detach().amax() for layer in self.layers]).tolist()
        exact = [math.ceil(z * config.max_span) + config.span_ramp + 1 for z in widest]
        return [min(config.max_span, math.ceil(reach / REACH_STEP) * REACH_STEP) for reach in exact]

    def span_penalty(self) -> Tensor:
        """L times the mean z of the heads, summed over the layers; training adds a small multiple of it to the loss."""
        return self.config.max_span * torch.stack([layer.span.mean() for layer in self.layers]).sum()

    @torch.no_grad()
    def clamp_spans(self) -> None:
        """Bring every z back to [0, 1]; to be called after each update."""
        for layer in self.layers:
            layer.span.clamp_(0, 1)


def span_mask(span: Tensor, *, num_slots: int, config: ModelConfig) -> Tensor:
    """The soft mask m(d) = clip((1 - d + z L) / R + 1, 0, 1) of each head at distance 1 .. num_slots, [H, S], fp32."""
    distance = torch.arange(1, num_slots + 1, device=span.device, dtype=torch.float32)
    return ((1 - distance + span.float()[:, None] * config.max_span) / config.span_ramp + 1).clamp(0, 1)


def _unless_all(filled: Tensor, reach: int, empty_slots: str) -> Tensor | None:
    """How many of the `reach` positions exist in each row; None where nothing has to be masked."""
    if empty_slots == "zero" or int(filled.min()) >= reach:
        return None
    return filled.clamp(max=reach)

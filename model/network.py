"""The network as it is trained: attention over cached hidden states, with spans and persistent vectors that learn.

Sizes: B streams, M tokens of a block, E width, H heads, D head size, N persistent vectors, L maximum span, S reach, V
vocabulary. Knows no optimizer and no data; `model.baked` turns it into what is served.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Block, banded_attention
from model.config import ModelConfig
from model.spans import group_heads, reach_of_heads, span_mask

CHUNK = 64  # queries that attend together: a wide band wastes products, a narrow one wastes launches


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
        width, heads, head, pairs = config.width, config.num_heads, config.head_size, config.num_persistent
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.persistent_key = nn.Parameter(torch.randn(heads, pairs, head) / math.sqrt(head))
        self.persistent_value = nn.Parameter(torch.randn(heads, pairs, head) / math.sqrt(pairs))
        self.span = nn.Parameter(torch.full((heads,), config.span_init))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, hidden: Tensor, past: Tensor, position: Tensor, *, reaches: Sequence[int], filled: Tensor | None
    ) -> Tensor:
        """Map the layer's inputs [B, M, E] to its outputs [B, M, E].

        Heads of like reach are computed together, over no more of the past than they reach.

        Args:
            past: [B, L, E], inputs of this layer at the L positions before the block.
            position: [D, L], column s for distance L - s.
            reaches: [H], a distance beyond which neither a head's mask nor its gradient differs from zero.
            filled: [B], how many of the L positions exist; None if all do.
        """
        config = self.config
        groups, order = group_heads(reaches, max_span=config.max_span)
        weights = [self._of_heads(linear.weight, order) for linear in (self.query, self.key, self.value)]
        persistent = self.persistent_key[order], self.persistent_value[order]
        span = self.span[order]
        outputs = [
            self._attend(
                hidden,
                past[:, config.max_span - group.num_slots :],
                [weight[group.heads].flatten(0, 1) for weight in weights],
                self._persistent_block(*(tensor[group.heads] for tensor in persistent)),
                position=position[:, config.max_span - group.num_slots :],
                mass=span_mask(span[group.heads], num_slots=group.num_slots, config=config).flip(-1),
                filled=filled,
            )
            for group in groups
        ]
        attended = torch.cat(outputs).permute(1, 2, 0, 3).flatten(2)  # [B, M, E]
        out = self._of_heads(self.out.weight.mT, order).flatten(0, 1)  # [E, E], a row for each attended number
        output: Tensor = self.norm(hidden + attended.to(hidden.dtype) @ out)
        return output

    def _attend(
        self,
        hidden: Tensor,
        past: Tensor,
        weights: Sequence[Tensor],
        persistent: Block,
        *,
        position: Tensor,
        mass: Tensor,
        filled: Tensor | None,
    ) -> Tensor:
        """One group of h heads with S slots: [B, M, E] and past [B, S, E] -> [h, B, M, D]."""
        num_slots, num_new, head = past.shape[1], hidden.shape[1], self.config.head_size
        context = torch.cat((past, hidden), 1)  # [B, S + M, E]
        query = _split_heads(F.linear(hidden, weights[0]), head) / math.sqrt(head)  # [h, B, M, D]
        key, value = (_split_heads(F.linear(context, weight), head) for weight in weights[1:])  # [h, B, S + M, D]
        persistent = Block(persistent.key.to(key.dtype), persistent.value.to(key.dtype))
        outputs = []
        for start in range(0, num_new, CHUNK):
            stop = min(start + CHUNK, num_new)
            window = slice(start, num_slots + stop)
            outputs.append(
                banded_attention(
                    query[:, :, start:stop],
                    key[:, :, window],
                    value[:, :, window],
                    persistent,
                    position=position,
                    mass=mass,
                    filled=None if filled is None or int(filled.min()) + start >= num_slots else filled + start,
                    dropout=self.config.dropout if self.training else 0.0,
                )
            )
        return torch.cat(outputs, 2)

    def _of_heads(self, weight: Tensor, order: Sequence[int]) -> Tensor:
        """[E, E] -> [H, D, E], the heads in another order."""
        return weight.view(self.config.num_heads, self.config.head_size, -1)[list(order)]

    def _persistent_block(self, key: Tensor, value: Tensor) -> Block:
        return Block(key * math.sqrt(self.config.head_size), value * math.sqrt(self.config.num_persistent))


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
        filled = cache.filled if config.empty_slots == "masked" else None
        for layer, past, reaches in zip(self.layers, cache.hidden, self.reaches(), strict=True):
            kept.append(torch.cat((past, hidden.detach()), 1)[:, -config.max_span :])
            hidden = layer(hidden, past, table, reaches=reaches, filled=filled)
        seen = (cache.filled + tokens.shape[1]).clamp(max=config.max_span)
        return hidden, StreamCache(tuple(kept), seen)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, [..., E] -> [..., V]."""
        scores: Tensor = self.output(hidden)
        return scores

    def reaches(self) -> list[list[int]]:
        """For each layer and head, a distance beyond which its mask and the gradient of the mask are zero."""
        spans = torch.stack([layer.span.detach() for layer in self.layers]).tolist()
        beyond = [reach_of_heads(layer, config=self.config) for layer in spans]
        return [[min(self.config.max_span, reach + 1) for reach in layer] for layer in beyond]

    def span_penalty(self) -> Tensor:
        """L times the mean z of the heads, summed over the layers; training adds a small multiple of it to the loss."""
        return self.config.max_span * torch.stack([layer.span.mean() for layer in self.layers]).sum()

    @torch.no_grad()
    def clamp_spans(self) -> None:
        """Bring every z back to [0, 1]; to be called after each update."""
        for layer in self.layers:
            layer.span.clamp_(0, 1)


def _split_heads(projected: Tensor, head_size: int) -> Tensor:
    """[B, T, h D] -> [h, B, T, D]"""
    rows, num_new, _ = projected.shape
    return projected.view(rows, num_new, -1, head_size).permute(2, 0, 1, 3).contiguous()

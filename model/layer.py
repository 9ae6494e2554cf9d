"""One layer as it is trained: heads with spans and persistent vectors that learn, over cached hidden states.

Sizes: B streams, M tokens of a block, E width, H heads, h heads of a group, D head size, N persistent vectors, L
maximum span, S slots. Knows no embedding, no loss and no optimizer.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Block, banded_attention
from model.config import ModelConfig
from model.spans import group_heads, span_mask

CHUNK = 64  # queries that attend together: a wide band wastes products, a narrow one wastes launches


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


def _split_heads(projected: Tensor, head_size: int) -> Tensor:
    """[B, T, h D] -> [h, B, T, D]"""
    rows, num_new, _ = projected.shape
    return projected.view(rows, num_new, -1, head_size).permute(2, 0, 1, 3).contiguous()

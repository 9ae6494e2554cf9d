"""One layer for training: heads that learn their spans and persistent vectors, and attend to cached hidden states.

Sizes: B streams, M tokens of a block, E width, H heads, h heads of a group, D head size, N persistent vectors, L
maximum span, S slots. Knows no embedding, no loss and no optimizer.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Block, chunked_attention
from model.config import ModelConfig
from model.network.tiled import tiled_attention
from model.spans import group_heads, span_mask


class PersistentAttention(nn.Module):
    """A layer: heads attend to the past and to their own persistent vectors; a residual and a norm follow."""

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
        self,
        hidden: Tensor,
        past: Tensor,
        position: Tensor,
        *,
        reaches: Sequence[int],
        filled: Tensor | None,
        cache_keys: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the layer's outputs [B, M, E] for inputs [B, M, E], and the block as later blocks take it in `past`.

        Heads of similar reach are computed together, and over no more of the past than they reach.

        Args:
            past: [B, L, E], inputs of this layer at the L positions before the block; with `cache_keys`, the keys and
                values of these positions instead, [B, L, 2 E].
            position: [D, L], column s for distance L - s.
            reaches: [H], for each head a distance beyond which its mask and the mask's gradient are zero.
            filled: [B], the number of the L positions that exist; None = all of them.
        """
        groups, order = group_heads(reaches, max_span=self.config.max_span)
        projections = self._projections(order)  # [3, H, D, E]
        pairs = projections[1:]  # [2, H, D, E]
        fresh = _project(hidden, projections)  # [3, H, B, M, D]: queries, keys and values of the block
        memory = self.persistent_key[order], self.persistent_value[order]  # [H, N, D] each
        mass = span_mask(self.span[order], num_slots=self.config.max_span, config=self.config).flip(-1)  # [H, L]
        outputs = []  # [h, B, M, D] each
        for group, own in zip(groups, torch.split(fresh, [group.num_heads for group in groups], 1), strict=True):
            window = slice(self.config.max_span - group.num_slots, None)  # the last S of the L positions
            before = (
                self._cached_pairs(past[:, window], order[group.heads])
                if cache_keys
                else _project(past[:, window], pairs[:, group.heads])
            )  # [2, h, B, S, D]
            persistent = self._persistent_block(*(tensor[group.heads] for tensor in memory))
            where, soft = position[:, window], mass[group.heads, window]  # [D, S], [h, S]
            outputs.append(self._attend(own, before, persistent, position=where, mass=soft, filled=filled))
        output = self._residual(hidden, torch.cat(outputs), order)
        return output, self._joined(fresh[1:].detach(), order) if cache_keys else hidden.detach()

    def _projections(self, order: Sequence[int]) -> Tensor:
        """Return the weights of queries (over sqrt(D)), keys and values, [3, H, D, E], heads in `order`."""
        query, key, value = (self._of_heads(one.weight, order) for one in (self.query, self.key, self.value))
        return torch.stack((query / math.sqrt(self.config.head_size), key, value))

    def _attend(
        self, own: Tensor, before: Tensor, persistent: Block, *, position: Tensor, mass: Tensor, filled: Tensor | None
    ) -> Tensor:
        """Return the attention [h, B, M, D] of the block to the window before it, to itself and to persistent vectors.

        Args:
            own: [3, h, B, M, D], queries, keys and values of the block.
            before: [2, h, B, S, D], keys and values of the window.
            persistent: keys and values [h, N, D].
            position: [D, S], the columns of the window.
            mass: [h, S], the soft masks over the window.
            filled: as for `forward`.
        """
        queries, *after = own.unbind()  # [h, B, M, D], and keys and values of the same shape
        key, value = (torch.cat(parts, 2) for parts in zip(before.unbind(), after, strict=True))  # [h, B, S + M, D]
        attend = tiled_attention if own.device.type == "cpu" else chunked_attention
        return attend(
            queries,
            key,
            value,
            Block(persistent.key.to(key.dtype), persistent.value.to(key.dtype)),
            position=position.to(key.dtype),
            mass=mass,
            filled=filled,
            dropout=self.config.dropout if self.training else 0.0,
        )

    def _residual(self, hidden: Tensor, attended: Tensor, order: Sequence[int]) -> Tensor:
        """Project the heads' results [H, B, M, D], heads in `order`, add the layer's input and normalise: [B, M, E]."""
        attended = attended.permute(1, 2, 0, 3).flatten(2)  # [B, M, E]
        out = self._of_heads(self.out.weight.mT, order).flatten(0, 1)  # [E, E], a row for each attended number
        output: Tensor = self.norm(hidden + attended.to(hidden.dtype) @ out)
        return output

    def _cached_pairs(self, past: Tensor, heads: Sequence[int]) -> Tensor:
        """Return the keys and values of some heads, [2, h, B, S, D], from cached pairs of all heads, [B, S, 2 E]."""
        config = self.config
        pairs = past.view(*past.shape[:2], 2, config.num_heads, config.head_size)
        return pairs[:, :, :, list(heads)].permute(2, 3, 0, 1, 4)

    def _joined(self, pairs: Tensor, order: Sequence[int]) -> Tensor:
        """Return keys and values [2, H, B, M, D], heads in `order`, as [B, M, 2 E], heads in their own order."""
        own = sorted(range(len(order)), key=lambda place: order[place])
        return pairs[:, own].permute(2, 3, 0, 1, 4).flatten(2)

    def _of_heads(self, weight: Tensor, order: Sequence[int]) -> Tensor:
        """Return a weight [E, E] by heads, [H, D, E], in another order."""
        return weight.view(self.config.num_heads, self.config.head_size, -1)[list(order)]

    def _persistent_block(self, key: Tensor, value: Tensor) -> Block:
        """Return persistent vectors [h, N, D], scaled by the factors that divide their initial values."""
        return Block(key * math.sqrt(self.config.head_size), value * math.sqrt(self.config.num_persistent))


def _project(hidden: Tensor, weights: Tensor) -> Tensor:
    """Multiply hidden states [B, T, E] by n weights of h heads [n, h, D, E]: [n, h, B, T, D]."""
    projected = F.linear(hidden, weights.flatten(0, 2))
    return projected.view(*hidden.shape[:2], *weights.shape[:3]).permute(2, 3, 0, 1, 4).contiguous()

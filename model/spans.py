"""Learned spans: the soft mask of a head, its reach (the largest distance it attends to), and groups of heads by reach.

Sizes: H heads, S distances, L maximum span, R ramp.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelShape

# Slots that one more group must save: more groups need fewer bytes, fewer groups need fewer kernel launches. On a
# CPU, 64, 200 and 600 decode equally fast (18 layers, batches of 1, 8 and 32), so the bytes decide.
GROUP_COST = 64


class HeadGroup(NamedTuple):
    """Heads of similar reach, consecutive when sorted by reach, that are computed together over `num_slots` slots."""

    first: int
    num_heads: int
    num_slots: int

    @property
    def heads(self) -> slice:
        """The heads of the group, as a slice of the sorted heads of the layer."""
        return slice(self.first, self.first + self.num_heads)


def span_mask(span: Tensor, *, num_slots: int, config: ModelShape) -> Tensor:
    """The soft mask m(d) = clip((1 - d + z L) / R + 1, 0, 1) of each head at distance 1 .. num_slots, [H, S], fp32."""
    distance = torch.arange(1, num_slots + 1, device=span.device, dtype=torch.float32)
    return ((1 - distance + span.float()[:, None] * config.max_span) / config.span_ramp + 1).clamp(0, 1)


def reach_of_heads(spans: Sequence[float], *, config: ModelShape) -> list[int]:
    """The largest distance at which the mask of each head may differ from zero: ceil(z L) + R, at most L."""
    return [min(config.max_span, math.ceil(z * config.max_span) + config.span_ramp) for z in spans]


def group_heads(reaches: Sequence[int], *, max_span: int) -> tuple[list[HeadGroup], list[int]]:
    """Sort heads by reach and cut them into groups of equal ring size, with the least sum of slots and group costs.

    Returns:
        the groups, shortest rings first, and the heads sorted by reach (in this order each group is consecutive).
    """
    order = sorted(range(len(reaches)), key=lambda head: reaches[head])
    sizes = [_ring_size(reaches[head], limit=max_span) for head in order]
    best: list[tuple[float, int]] = [(0.0, 0)]  # at n, for the first n heads: least cost, start of the last group
    for stop in range(1, len(sizes) + 1):
        costs = [(best[start][0] + (stop - start) * sizes[stop - 1] + GROUP_COST, start) for start in range(stop)]
        best.append(min(costs))
    groups: list[HeadGroup] = []
    stop = len(sizes)
    while stop:
        start = best[stop][1]
        groups.insert(0, HeadGroup(start, stop - start, sizes[stop - 1]))
        stop = start
    return groups, order


def _ring_size(reach: int, *, limit: int) -> int:
    """The reach, rounded up to four sizes an octave: few different sizes, so that layers share their tables."""
    step = max(8, 1 << max(0, reach.bit_length() - 3))
    return min(limit, math.ceil(reach / step) * step)

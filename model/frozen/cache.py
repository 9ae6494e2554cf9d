"""The state of live streams: a ring of keys and values, of constant size, for every layer and group of heads.

Sizes: R rows, h heads of a group, S slots of its rings, D head size. Keys and values are the two halves of one tensor,
[2, R, h, S, D]. The token at position p lies in slot p % S. Owns the memory and the lengths; knows no weights and no
scheduling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.spans import HeadGroup


@dataclass(frozen=True)
class RowSnapshot:
    """A copy of one row's whole state; `restore` of any cache of the same model takes it."""

    length: int
    rings: list[Tensor]  # [2, h, S, D] of every layer and group

    @property
    def num_bytes(self) -> int:
        """The memory that the copy takes, in bytes."""
        return sum(ring.nbytes for ring in self.rings)


class RingCache:
    """The rings and lengths of a fixed number of rows."""

    def __init__(
        self,
        groups: Sequence[Sequence[HeadGroup]],
        *,
        num_rows: int,
        head_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.groups = groups
        self.rings = [
            [
                torch.zeros(2, num_rows, group.num_heads, group.num_slots, head_size, dtype=dtype, device=device)
                for group in layer
            ]
            for layer in groups
        ]
        self.lengths = np.zeros(num_rows, dtype=np.int64)  # [R], tokens each row has consumed, never clipped

    @property
    def bytes_per_row(self) -> int:
        """The memory of one live stream, in bytes, whatever its length."""
        return sum(ring[:, 0].nbytes for ring in self._all())

    def reset(self, row: int) -> None:
        """Begin a new stream in a row."""
        self.lengths[row] = 0
        for ring in self._all():
            ring[:, row].zero_()

    def move(self, source: int, target: int) -> None:
        """Copy the whole state of the row `source` to the row `target`."""
        self.lengths[target] = self.lengths[source]
        for ring in self._all():
            ring[:, target].copy_(ring[:, source])

    def snapshot(self, row: int) -> RowSnapshot:
        """Return a copy of the whole state of a row."""
        return RowSnapshot(int(self.lengths[row]), [ring[:, row].clone() for ring in self._all()])

    def restore(self, row: int, snapshot: RowSnapshot) -> None:
        """Set a row to the state of a snapshot; the row goes on as the row of the snapshot did."""
        self.lengths[row] = snapshot.length
        for ring, kept in zip(self._all(), snapshot.rings, strict=True):
            ring[:, row].copy_(kept)

    def some_rows(self, rows: Sequence[int]) -> list[list[tuple[Tensor, Tensor]]]:
        """Return keys and values [rows, h, S, D] of rows by layer and group: views of consecutive rows, else copies."""
        first, count = rows[0], len(rows)
        if list(rows) == list(range(first, first + count)):
            return [
                [(ring[0, first : first + count], ring[1, first : first + count]) for ring in layer]
                for layer in self.rings
            ]
        index = torch.as_tensor(rows, device=self.rings[0][0].device)
        return [[(ring[0, index], ring[1, index]) for ring in layer] for layer in self.rings]

    def recent(self, layer: int, group: int, rows: Sequence[int]) -> Tensor:
        """Return a copy of the keys and values of some rows, oldest first, [2, h, rows, S, D]."""
        ring = self.rings[layer][group]
        num_slots = ring.shape[3]
        order = (self.lengths[list(rows), None] + np.arange(num_slots)) % num_slots  # [rows, S]
        index = torch.as_tensor(rows, device=ring.device)[:, None]
        ordered: Tensor = ring[:, index, :, torch.from_numpy(order).to(ring.device)]  # [rows, S, 2, h, D]
        return ordered.permute(2, 3, 0, 1, 4)

    def commit(self, rows: Sequence[int], new: Sequence[Tensor], num_new: Sequence[int]) -> None:
        """Write the keys and values of new tokens and advance the lengths.

        Args:
            rows: the row of each entry of `new`.
            new: for each layer the keys and values [rows, T, 2, H, D] that a step returned.
            num_new: for each row the number of its T tokens that count; the tokens after them are padding.
        """
        places: dict[int, tuple[Tensor, ...]] = {}
        for layer_groups, layer_rings, fresh in zip(self.groups, self.rings, new, strict=True):
            for group, ring in zip(layer_groups, layer_rings, strict=True):
                if group.num_slots not in places:
                    places[group.num_slots] = self._places(rows, num_new, group.num_slots, ring.device)
                entry, token, row, slot = places[group.num_slots]
                ring[:, row, :, slot] = fresh[entry, token, :, group.heads].to(ring.dtype)
        self.lengths[list(rows)] += np.asarray(num_new)

    def _places(
        self, rows: Sequence[int], num_new: Sequence[int], num_slots: int, device: torch.device
    ) -> tuple[Tensor, ...]:
        """Return the tokens that rings of this size keep, as (entry of `new`, token, row, slot), each [n]."""
        counts = np.asarray(num_new)[:, None]
        tokens = np.arange(counts.max())
        entry, token = np.nonzero((tokens < counts) & (tokens >= counts - num_slots))
        row = np.asarray(rows)[entry]
        slot = (self.lengths[row] + token) % num_slots
        return tuple(torch.from_numpy(place).to(device) for place in (entry, token, row, slot))

    def _all(self) -> list[Tensor]:
        return [ring for layer in self.rings for ring in layer]

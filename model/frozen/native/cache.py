"""The state of live streams of the native step: one block of memory a row, in the step's own layout.

Sizes: R rows, T new tokens, H heads, D head size.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from model.frozen.cache import RowSnapshot

Commit = Callable[["NativeCache", Sequence[int], Sequence[Tensor], Sequence[int]], None]


class NativeCache:
    """Rings and lengths of a fixed number of rows."""

    def __init__(self, *, num_rows: int, row_bytes: int, commit: Commit) -> None:
        """`commit` writes new keys and values in the layout of the model's step."""
        self.rings = torch.zeros(num_rows, row_bytes, dtype=torch.uint8)  # [R, bytes], see `Head` in model.h
        self.lengths = np.zeros(num_rows, dtype=np.int64)  # [R], tokens each row has consumed, never clipped
        self._commit = commit

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one live stream costs, whatever its length."""
        return self.rings.shape[1]

    def reset(self, row: int) -> None:
        """Begin a fresh stream in a row."""
        self.lengths[row] = 0
        self.rings[row].zero_()

    def move(self, source: int, target: int) -> None:
        """Copy the whole state of one row over another."""
        self.lengths[target] = self.lengths[source]
        self.rings[target].copy_(self.rings[source])

    def snapshot(self, row: int) -> RowSnapshot:
        """A copy of the whole state of a row."""
        return RowSnapshot(int(self.lengths[row]), [self.rings[row].clone()])

    def restore(self, row: int, snapshot: RowSnapshot) -> None:
        """Put a row into the state that another one had; it goes on as that one did."""
        self.lengths[row] = snapshot.length
        self.rings[row].copy_(snapshot.rings[0])

    def commit(self, rows: Sequence[int], new: Sequence[Tensor], num_new: Sequence[int]) -> None:
        """Write the keys and values of new tokens and advance the lengths.

        Args:
            rows: which row each entry of `new` belongs to.
            new: for each layer keys and values [rows, T, 2, H, D], what a step returned.
            num_new: how many of the T tokens of each row are real; the rest is padding and leaves no trace.
        """
        self._commit(self, rows, new, num_new)

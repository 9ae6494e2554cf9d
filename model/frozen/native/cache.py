"""The state of the native step's live streams: one block of memory for each row, in the step's own layout.

Sizes: R rows, T new tokens, H heads, D head size.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from model.frozen.cache import RowSnapshot

Commit = Callable[["NativeCache", Sequence[int], Sequence[Tensor], Sequence[int]], None]


class NativeCache:
    """The rings and lengths of a fixed number of rows."""

    def __init__(self, *, num_rows: int, row_bytes: int, commit: Commit) -> None:
        """Allocate empty rings. `commit` is the model's function that writes new keys and values in its layout."""
        self.rings = torch.zeros(num_rows, row_bytes, dtype=torch.uint8)  # [R, bytes], see `Head` in model.h
        self.lengths = np.zeros(num_rows, dtype=np.int64)  # [R], tokens each row has consumed, never clipped
        self._commit = commit

    @property
    def bytes_per_row(self) -> int:
        """The memory of one live stream, in bytes, whatever its length."""
        return self.rings.shape[1]

    def reset(self, row: int) -> None:
        """Begin a new stream in a row."""
        self.lengths[row] = 0
        self.rings[row].zero_()

    def move(self, source: int, target: int) -> None:
        """Copy the whole state of the row `source` to the row `target`."""
        self.lengths[target] = self.lengths[source]
        self.rings[target].copy_(self.rings[source])

    def snapshot(self, row: int) -> RowSnapshot:
        """Return a copy of the whole state of a row."""
        return RowSnapshot(int(self.lengths[row]), [self.rings[row].clone()])

    def restore(self, row: int, snapshot: RowSnapshot) -> None:
        """Set a row to the state of a snapshot; the row goes on as the row of the snapshot did."""
        self.lengths[row] = snapshot.length
        self.rings[row].copy_(snapshot.rings[0])

    def commit(self, rows: Sequence[int], new: Sequence[Tensor], num_new: Sequence[int]) -> None:
        """Write the keys and values of new tokens and advance the lengths.

        Args:
            rows: the row of each entry of `new`.
            new: for each layer the keys and values [rows, T, 2, H, D] that a step returned.
            num_new: for each row the number of its T tokens that count; the tokens after them are padding.
        """
        self._commit(self, rows, new, num_new)

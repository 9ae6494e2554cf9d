"""Batches for training: every stream reads its own segment of the split, block after block.

Sizes: n tokens of the split, B streams (b streams of this process), M tokens of a block. Knows no text, no model and no
devices.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.config import ConfigError


@dataclass(frozen=True)
class Batch:
    """One block of every stream of this process."""

    inputs: Tensor  # [b, M] int64
    targets: Tensor  # [b, M] int64, the inputs one token later
    reset: Tensor  # [b] bool: these streams forget their past before the block


class Streams:
    """Streams that read B equal segments of a split, block by block; each later epoch starts at a random offset."""

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        num_streams: int,
        block: int,
        seed: int,
        reset_prob: float,
        own: slice = slice(None),
    ) -> None:
        """Start at the beginning of every segment.

        Args:
            tokens: [n] integers.
            reset_prob: the probability that a stream forgets its past before a block; its text continues.
            own: the streams of this process; neither the text and resets of a stream nor the state depend on it.

        Raises:
            ConfigError: too few tokens. A segment must hold a block at any offset, so it needs two blocks.
        """
        self._segment_size = len(tokens) // num_streams  # tokens of a segment
        if self._segment_size < 2 * block:
            raise ConfigError(
                f"{len(tokens)} tokens are too few for data.batch = {num_streams} streams of data.block = {block}: "
                f"at least {num_streams * 2 * block} are needed"
            )
        self._lines = tokens[: self._segment_size * num_streams].reshape(num_streams, -1)  # [B, tokens of a segment]
        self._own = own
        self._block = block
        self._reset_prob = reset_prob
        self._random = np.random.default_rng(seed)
        self._position = 0  # position of the next block in every segment
        self._fresh = True  # whether the next block starts an epoch
        self._epoch = 0

    @property
    def blocks_per_epoch(self) -> int:
        """Number of whole blocks in a segment that is read from its beginning."""
        return (self._segment_size - 1) // self._block

    @property
    def epochs(self) -> float:
        """How many times the split has been read."""
        return self._epoch + self._position / self._segment_size

    def next(self) -> Batch:
        """The next block of every stream of this process."""
        if self._position + self._block >= self._segment_size:
            self._epoch += 1
            self._position = int(self._random.integers(self._block))
            self._fresh = True
        window = self._lines[self._own, self._position : self._position + self._block + 1].astype(np.int64)
        reset = self._random.random(len(self._lines)) < self._reset_prob
        if self._fresh:
            reset[:] = True
        self._position += self._block
        self._fresh = False
        tokens = torch.from_numpy(window)  # [b, M + 1]
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.from_numpy(reset[self._own]))

    def state_dict(self) -> dict[str, Any]:
        """The state of all streams, as plain values."""
        random = json.dumps(self._random.bit_generator.state)  # as JSON, because its integers have 128 bits
        return {"place": self._position, "fresh": self._fresh, "epoch": self._epoch, "random": random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._position, self._fresh, self._epoch = state["place"], state["fresh"], state["epoch"]
        self._random.bit_generator.state = json.loads(state["random"])

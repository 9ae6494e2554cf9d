"""Tokens to batches: every stream walks its own stretch of the split, block after block.

Sizes: n tokens of the split, B streams (of them b read by this process), M tokens of a block. Knows no text, no model
and no devices.
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
    """The next block of every stream that is read here."""

    inputs: Tensor  # [b, M] int64
    targets: Tensor  # [b, M] int64, the inputs one token later
    reset: Tensor  # [b] bool: these streams forget their past before the block


class Streams:
    """Consecutive blocks of B equal stretches; after each epoch all streams move on by a random part of a block."""

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
        """Begin at the start of every stretch.

        Args:
            tokens: [n] integers.
            reset_prob: the chance that a stream's past is forgotten before a block, though its text goes on.
            own: which of the streams are read here; neither what they read and forget nor the state depends on it.

        Raises:
            ConfigError: too few tokens; a stretch holds a block at any phase, so two blocks.
        """
        self._stretch = len(tokens) // num_streams  # tokens of one stream
        if self._stretch < 2 * block:
            raise ConfigError(
                f"{len(tokens)} tokens are too few for data.batch = {num_streams} streams of data.block = {block}: "
                f"at least {num_streams * 2 * block} are needed"
            )
        self._lines = tokens[: self._stretch * num_streams].reshape(num_streams, self._stretch)
        self._own = own
        self._block = block
        self._reset_prob = reset_prob
        self._random = np.random.default_rng(seed)
        self._place = 0  # of the next block in every stretch
        self._fresh = True  # the next block begins an epoch
        self._epoch = 0

    @property
    def blocks_per_epoch(self) -> int:
        """Whole blocks in a stretch that starts at its beginning."""
        return (self._stretch - 1) // self._block

    @property
    def epochs(self) -> float:
        """How many times the split has been read."""
        return self._epoch + self._place / self._stretch

    def next(self) -> Batch:
        """The next block of every stream that is read here."""
        if self._place + self._block >= self._stretch:
            self._epoch += 1
            self._place = int(self._random.integers(self._block))
            self._fresh = True
        window = self._lines[self._own, self._place : self._place + self._block + 1].astype(np.int64)
        reset = self._random.random(len(self._lines)) < self._reset_prob
        if self._fresh:
            reset[:] = True
        self._place += self._block
        self._fresh = False
        both = torch.from_numpy(window)
        return Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous(), torch.from_numpy(reset[self._own]))

    def state_dict(self) -> dict[str, Any]:
        """Where all the streams are, as plain values."""
        random = json.dumps(self._random.bit_generator.state)  # its integers have 128 bits
        return {"place": self._place, "fresh": self._fresh, "epoch": self._epoch, "random": random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self._place, self._fresh, self._epoch = state["place"], state["fresh"], state["epoch"]
        self._random.bit_generator.state = json.loads(state["random"])

"""One training run: what changes while a model learns, the step that changes it, and the loop around the step.

The order of a step: fresh streams, forward, loss, check, backward, clip, update, clamp. Knows no files.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.network import AllAttentionLM, StreamCache
from training.config import RunConfig
from training.data import Streams
from training.optim import Optimizer


class NonFiniteLossError(RuntimeError):
    """The loss is not a number any more. Raised before the update: the weights are those of the step before."""


@dataclass(frozen=True)
class Report:
    """What one step did."""

    step: int  # steps finished
    tokens: int  # tokens seen since the start of the run
    loss: float  # nats per token of this step's blocks
    gradient_norm: float
    learning_rate: float
    seconds: float  # spent in steps since the start of the run, resumptions included


class Run:
    """A model in training, with optimizer, place in the data, caches and clock; `state` is all a checkpoint needs."""

    def __init__(self, config: RunConfig, network: AllAttentionLM, tokens: np.ndarray) -> None:
        """tokens: [n] integers, the training split."""
        self.config = config
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if config.device == "auto" else config.device)
        self.network = network.to(self.device)
        self.streams = Streams(
            tokens,
            num_streams=config.data.batch,
            block=config.data.block,
            seed=config.seed,
            reset_prob=config.data.reset_prob,
        )
        self.optimizer = Optimizer(network, config.optim)
        self.cache: StreamCache = self.network.init_cache(config.data.batch)
        self.step_count = 0
        self.seconds = 0.0

    @property
    def tokens_seen(self) -> int:
        """Tokens learned from since the start of the run."""
        return self.step_count * self.config.data.batch * self.config.data.block

    @property
    def share(self) -> float:
        """How much of the run is done, 0 .. 1: of its steps or of its time, whichever is further."""
        optim = self.config.optim
        done = self.step_count / optim.max_steps
        return min(1.0, done if optim.max_seconds is None else max(done, self.seconds / optim.max_seconds))

    def step(self) -> Report:
        """Learn from the next block of every stream.

        Raises:
            NonFiniteLossError: the loss or the gradient is not finite; nothing has been updated.
        """
        begun = time.perf_counter()
        self.network.train()
        batch = self.streams.next()
        inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
        with self._autocast():
            hidden, cache = self.network(inputs, self.cache.reset(batch.reset))
            loss = self.network.loss(hidden, targets) / targets.numel()
        (loss + self.config.optim.span_penalty * self.network.span_penalty()).backward()  # type: ignore[no-untyped-call]
        norm = self.optimizer.clip()
        nats = float(loss.detach())
        if not (math.isfinite(nats) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise NonFiniteLossError(
                f"step {self.step_count + 1}: loss {nats}, gradient norm {norm}; the weights are still those of step "
                f"{self.step_count}. Lower optim.lr ({self.config.optim.lr}) or optim.grad_clip "
                f"({self.config.optim.grad_clip}), or use dtype = 'float32'"
            )
        rate = self.optimizer.step(step=self.step_count, share=self.share)
        self.network.clamp_spans()
        self.cache = cache
        self.step_count += 1
        self.seconds += time.perf_counter() - begun
        return Report(self.step_count, self.tokens_seen, nats, norm, rate, self.seconds)

    def steps(self) -> Iterator[Report]:
        """Step until the run is done."""
        while self.share < 1:
            yield self.step()

    @torch.no_grad()
    def loss_on(self, tokens: np.ndarray, *, num_streams: int = 16) -> float:
        """Nats per token of a stretch of another split, read as several streams at once: quick, to watch progress."""
        num_streams = min(num_streams, max(1, len(tokens) // (2 * self.config.data.block)))
        streams = Streams(tokens, num_streams=num_streams, block=self.config.data.block, seed=0, reset_prob=0.0)
        self.network.eval()
        cache, total, count = self.network.init_cache(num_streams), 0.0, 0
        for _ in range(streams.blocks_per_epoch):
            batch = streams.next()
            with self._autocast():
                hidden, cache = self.network(batch.inputs.to(self.device), cache)
                total += float(self.network.loss(hidden, batch.targets.to(self.device)))
            count += batch.targets.numel()
        return total / count

    def state(self) -> dict[str, Any]:
        """Everything that decides the next steps, as tensors and plain values; `restore` makes them bit-exact."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "streams": self.streams.state_dict(),
            "cache": {"hidden": list(self.cache.hidden), "filled": self.cache.filled},
            "random": _random_state(self.device),
            "step": self.step_count,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.streams.load_state_dict(state["streams"])
        hidden = tuple(tensor.to(self.device) for tensor in state["cache"]["hidden"])
        self.cache = StreamCache(hidden, state["cache"]["filled"].cpu())
        _set_random_state(state["random"], self.device)
        self.step_count = state["step"]
        self.seconds = state["seconds"]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)

"""One training run: its state, the step that updates the state, and the loop over steps.

The order of a step: reset streams, forward, loss, backward, clip, check, update, clamp spans. Every device takes the
same step with its own streams. Knows no files.

Sizes: b streams of a device, M tokens of a block, n tokens of a split.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.network.network import AllAttentionLM, StreamCache
from training.config import RunConfig
from training.data import Batch, Streams
from training.devices import Devices, cut_like, whole
from training.optim import Optimizer


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient is not finite. Raised before the update: the weights are those of the previous step."""


@dataclass(frozen=True)
class Report:
    """The metrics of one step."""

    step: int  # number of finished steps
    tokens: int  # tokens seen since the start of the run
    loss: float  # nats per token of this step's blocks
    gradient_norm: float
    learning_rate: float
    seconds: float  # spent in steps since the start of the run, resumptions included


@dataclass(frozen=True)
class MicroBatch:
    """The part of a batch that one forward pass reads. Not a tuple, because DDP and FSDP would move its tensors."""

    inputs: Tensor  # [b, M] int64
    targets: Tensor  # [b, M] int64
    cache: StreamCache


class LossModule(nn.Module):
    """A module that computes the loss of a network: DDP and FSDP need the forward pass and the loss in one module."""

    def __init__(self, network: AllAttentionLM) -> None:
        super().__init__()
        self.network = network

    def forward(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, StreamCache]:
        """The summed cross-entropy of the targets in nats, the span penalty, and the cache for the next block."""
        hidden, cache = self.network(micro_batch.inputs, micro_batch.cache)
        return self.network.loss(hidden, micro_batch.targets), self.network.span_penalty(), cache


class Run:
    """A model in training with its optimizer, streams, caches and clock; a checkpoint stores `state`."""

    def __init__(
        self, config: RunConfig, network: AllAttentionLM, tokens: np.ndarray, *, devices: Devices | None = None
    ) -> None:
        """tokens: [n] integers, the training split; devices: default: `config.device` in a single process.

        Raises:
            ConfigError: the streams cannot be divided evenly over the devices, or the split is too short.
        """
        self.config = config
        self.devices = devices or Devices.alone(config.device)
        local_streams = self.devices.share_of(config.data.batch, accumulate=config.optim.accumulate)
        self.streams = Streams(
            tokens,
            num_streams=config.data.batch,
            block=config.data.block,
            seed=config.seed,
            reset_prob=config.data.reset_prob,
            own=local_streams,
        )
        self.network = network
        self._spans = [layer.span for layer in network.layers]
        self._loss_module = self._spread()
        self.optimizer = Optimizer(network, config.optim)
        self._local_streams = local_streams
        num_streams = (local_streams.stop - local_streams.start) // config.optim.accumulate
        self._caches = [self._fresh_cache(num_streams) for _ in range(config.optim.accumulate)]  # by part of the batch
        self.step_count = 0
        self.seconds = 0.0
        if not self.devices.is_first:  # rank 0 continues the random numbers that drew the weights
            torch.manual_seed(config.seed + self.devices.rank)

    def _spread(self) -> nn.Module:
        self.network.checkpoint_activations = self.config.checkpoint_activations
        self.network.cache_keys = self.config.cache == "keys"
        if self.config.compile:
            for layer in self.network.layers:
                layer.compile(dynamic=False)
        return self.devices.spread(LossModule(self.network), parts=list(self.network.layers), kept=self._spans)

    def _fresh_cache(self, num_streams: int) -> StreamCache:
        with self._autocast():
            cache = self.network.init_cache(num_streams)
        return StreamCache(tuple(map(whole, cache.layers)), cache.filled)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.devices.device

    @property
    def tokens_seen(self) -> int:
        """Tokens seen since the start of the run."""
        return self.step_count * self.config.data.batch * self.config.data.block

    @property
    def share(self) -> float:
        """The share of the run that is done, 0 .. 1: the share of steps or of time, whichever is larger."""
        optim = self.config.optim
        done = self.step_count / optim.max_steps
        return min(1.0, done if optim.max_seconds is None else max(done, self.seconds / optim.max_seconds))

    def step(self) -> Report:
        """Train on the next block of every stream.

        Raises:
            NonFiniteLossError: the loss or the gradient is not finite; nothing was updated. Every device raises it.
        """
        begun = time.perf_counter()
        self._loss_module.train()
        nats, caches = self._gradients(self.streams.next())
        nats = self.devices.sum(nats) / (self.config.data.batch * self.config.data.block)
        norm = self.optimizer.clip()
        if not (math.isfinite(nats) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise NonFiniteLossError(
                f"step {self.step_count + 1}: loss {nats}, gradient norm {norm}; the weights are still those of step "
                f"{self.step_count}. Lower optim.lr ({self.config.optim.lr}) or optim.grad_clip "
                f"({self.config.optim.grad_clip}), or use dtype = 'float32'"
            )
        rate = self.optimizer.step(step=self.step_count, share=self.share)
        self.network.clamp_spans()
        self._caches = caches
        self.step_count += 1
        self.seconds += self.devices.of_first(
            time.perf_counter() - begun
        )  # the clock of rank 0, because time may determine the schedule
        return Report(self.step_count, self.tokens_seen, nats, norm, rate, self.seconds)

    def _gradients(self, batch: Batch) -> tuple[float, list[StreamCache]]:
        """Compute the gradient of the mean loss over all devices; return the nats and the new caches of this device."""
        num_parts, total, caches = len(self._caches), 0.0, []
        parts = zip(*(tensor.chunk(num_parts) for tensor in (batch.inputs, batch.targets, batch.reset)), strict=True)
        for number, (inputs, targets, reset) in enumerate(parts, 1):
            last = number == num_parts
            with nullcontext() if last else self.devices.hold_back(self._loss_module):
                cache = self._caches[number - 1].reset(reset)
                with self._autocast():
                    nats, penalty, cache = self._loss_module(
                        MicroBatch(inputs.to(self.device), targets.to(self.device), cache)
                    )
                    loss = nats / batch.targets.numel()
                (loss + self.config.optim.span_penalty / num_parts * penalty).backward()
            total = total + nats.detach()
            caches.append(cache)
        self.devices.average(self._spans)
        return float(total), caches

    def steps(self) -> Iterator[Report]:
        """Step until the run is done."""
        while self.share < 1:
            yield self.step()

    @torch.no_grad()
    def loss_on(self, tokens: np.ndarray, *, num_streams: int = 16) -> float:
        """Nats per token of `tokens`, read as several streams at once: a fast estimate for validation.

        Every device reads all tokens: with sharded weights all devices must take part; otherwise waiting takes as long.
        """
        num_streams = min(num_streams, max(1, len(tokens) // (2 * self.config.data.block)))
        streams = Streams(tokens, num_streams=num_streams, block=self.config.data.block, seed=0, reset_prob=0.0)
        self._loss_module.eval()
        cache, total, count = self._fresh_cache(num_streams), 0.0, 0
        for _ in range(streams.blocks_per_epoch):
            batch = streams.next()
            with self._autocast():
                micro_batch = MicroBatch(batch.inputs.to(self.device), batch.targets.to(self.device), cache)
                nats, _, cache = self._loss_module(micro_batch)
            total += float(nats)
            count += batch.targets.numel()
        return self.devices.of_first(total / count)

    def spans(self) -> list[list[float]]:
        """The learned span of every head in tokens, one list for each layer."""
        return [(self.config.model.max_span * span.detach()).tolist() for span in self._spans]

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, not sharded."""
        return {name: whole(tensor) for name, tensor in self.network.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Everything that determines the next steps, as tensors and plain values; complete on rank 0.

        Only the state of the random number generators depends on the number of devices.
        """
        return {
            "network": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "streams": self.streams.state_dict(),
            "cache": {
                "layers": [
                    self.devices.gather(_joined([cache.layers[layer] for cache in self._caches]))
                    for layer in range(len(self.network.layers))
                ],
                "filled": self.devices.gather(_joined([cache.filled for cache in self._caches])),
            },
            "random": {name: self.devices.gather(state[None]) for name, state in _random_state(self.device).items()},
            "step": self.step_count,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state` returned: bit for bit, or, with another number of devices, up to rounding.

        With another number of devices, dropout also differs: its seeds depend on (seed, step, rank).
        """
        for name, tensor in self.network.state_dict().items():
            tensor.copy_(cut_like(state["network"][name], tensor))
        self.optimizer.load_state_dict(state["optimizer"])
        self.streams.load_state_dict(state["streams"])
        self._caches = self._cut(state["cache"])
        self.step_count = state["step"]
        self.seconds = state["seconds"]
        random, rank = state["random"], self.devices.rank
        if len(random["cpu"]) == self.devices.size:
            _set_random_state({name: states[rank].clone() for name, states in random.items()}, self.device)
        else:
            seeds = np.random.SeedSequence((self.config.seed, self.step_count, rank))
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))

    def _cut(self, saved: dict[str, Any]) -> list[StreamCache]:
        """The caches of this device's streams out of the caches of all streams, one for each part of a batch."""
        num_parts = len(self._caches)
        filled = saved["filled"][self._local_streams].clone().chunk(num_parts)
        parts = [tensor[self._local_streams].to(self.device, copy=True).chunk(num_parts) for tensor in saved["layers"]]
        return [StreamCache(tuple(part), filled[i]) for i, part in enumerate(zip(*parts, strict=True))]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)

"""The devices of a run: the one of this process, and what crosses to the other processes that torchrun started.

W processes, one a device; rank r of them. Where W is 1 every exchange is the identity. All methods that exchange
anything are to be called by all processes, in one order. Knows no data, no optimizer and no files.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.config import ConfigError, RunConfig

# The longest wait is for rank 0 to learn a tokenizer. A process that dies ends the others at once, through torchrun.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Devices:
    """All devices of a run, seen from one process."""

    device: torch.device  # this process's own
    rank: int = 0
    size: int = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"

    @classmethod
    def alone(cls, name: str) -> "Devices":
        """One process; `name` is the configuration's `device`."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(torch.device(auto if name == "auto" else name))

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints, and writes files."""
        return self.rank == 0

    def share_of(self, num_streams: int, *, accumulate: int) -> slice:
        """Which of the streams are this process's own.

        Raises:
            ConfigError: they cannot be dealt out evenly.
        """
        if num_streams % (self.size * accumulate):
            raise ConfigError(
                f"data.batch = {num_streams} cannot be cut evenly: it must be a multiple of {self.size * accumulate}, "
                f"the number of devices ({self.size}) times optim.accumulate ({accumulate})"
            )
        own = num_streams // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def spread(self, module: nn.Module, *, parts: Sequence[nn.Module], kept: Iterable[nn.Parameter]) -> nn.Module:
        """Put a module on the devices; what is returned is to be called in its place, forward to backward.

        The gradients that remain after a backward pass are means over the devices, but see `average`.

        Args:
            parts: where weights are cut up (FSDP), these submodules are put together one at a time.
            kept: parameters that are never cut up: they are read outside of the forward pass.
        """
        if self.size == 1 or self.parallel == "ddp":
            module.to(self.device)
            return module if self.size == 1 else DistributedDataParallel(module, gradient_as_bucket_view=True)
        # These imports take a second, which only a run of cut weights shall pay; so in `cut_like`.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        kept = set(kept)
        for parameter in kept:
            parameter.data = parameter.data.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.size,))
        for part in (*parts, module):  # from the CPU, part by part: the whole need not fit on a device
            fully_shard(part, mesh=mesh, ignored_params=kept)
        return module

    def hold_back(self, module: nn.Module) -> AbstractContextManager[None]:
        """Inside, a forward and backward pass leaves gradients on their device: a later pass exchanges the sum.

        FSDP exchanges at every pass all the same, since gradients that wait would be whole ones.
        """
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make gradients that FSDP leaves alone (`kept` in `spread`) means over the devices, as the rest."""
        if self.size == 1 or self.parallel == "ddp":
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        means = torch.split(flat / self.size, [gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def sum(self, number: float) -> float:
        """The sum of every device's number, in double precision."""
        return self._reduced([number], dist.ReduceOp.SUM)[0]

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is up on any device: what all decide alike."""
        return [flag > 0 for flag in self._reduced(list(map(float, flags)), dist.ReduceOp.MAX)]

    def of_first(self, number: float) -> float:
        """The number of rank 0, on every device."""
        return self._reduced([number if self.is_first else 0.0], dist.ReduceOp.SUM)[0]

    def _reduced(self, numbers: list[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, through gloo
        dist.all_reduce(tensor, how)
        return tensor.tolist()

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of every device -> [W n, ...] in the order of ranks, on the CPU of rank 0; empty on the others."""
        if self.size == 1:
            return rows
        rows = rows.detach().cpu().contiguous()
        received = [torch.empty_like(rows) for _ in range(self.size)] if self.is_first else None
        dist.gather(rows, received)
        return rows[:0] if received is None else torch.cat(received)

    def wait(self) -> None:
        """Until all are here."""
        self.sum(0.0)

    def say(self, line: str) -> None:
        """Print a line once, not once a device."""
        if self.is_first:
            print(line, flush=True)


@contextmanager
def join(config: RunConfig) -> Iterator[Devices]:
    """The devices of a run, for as long as the block lasts: all that torchrun started, or one.

    Raises:
        ConfigError: the settings do not fit so many devices, or a process has none of its own.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun sets it
    if size == 1:
        yield Devices.alone(config.device)
        return
    device = _own_device(config, local_rank=int(os.environ["LOCAL_RANK"]), size=size)
    if config.parallel == "fsdp" and config.optim.name == "muon":
        raise ConfigError(
            "optim.name = 'muon' needs whole matrices, which parallel = 'fsdp' cuts up; allowed: parallel = 'ddp', or "
            "optim.name = 'adamw' or 'adagrad'"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    yield Devices(device, dist.get_rank(), size, config.parallel)
    # Not after an exception: the others may be waiting for what will never come, and end when this process does. The
    # group is never destroyed: whoever frees it holds the interpreter's lock and waits for gloo's thread, which may be
    # waiting for that lock (torch 2.13). It ends with the process.
    dist.barrier()


def leave(status: int) -> NoReturn:
    """End this process; under torchrun at once: the interpreter's clean-up would free the group, see `join`."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_cut(tensor: Tensor) -> bool:
    """Whether a tensor is cut up over the devices: a torch.distributed.tensor.DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is cut up over the devices, on each of them; another one as it is."""
    return tensor.full_tensor() if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def cut_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same on every device, as a copy on the device of `other`, cut up as `other` is, if it is."""
    if not is_cut(other):
        return tensor.to(other.device, copy=True)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    cut = distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
    return cut.clone()  # so that no part holds on to the whole


def _own_device(config: RunConfig, *, local_rank: int, size: int) -> torch.device:
    if ":" in config.device:
        raise ConfigError(f"device = {config.device!r} is one device for {size} processes; allowed: auto, cpu, cuda")
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank + 1} of this machine has no device of its own: it has {torch.cuda.device_count()} "
            f"of CUDA; start at most as many (--nproc-per-node), or use device = 'cpu'"
        )
    return torch.device("cuda", local_rank)

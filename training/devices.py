"""The devices of a run, and the communication between the processes that torchrun started, one for each device.

With a single process every exchange is the identity. Every process must call the methods that communicate, in the same
order. Knows no data, no optimizer and no files.

Sizes: W processes.
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

# The longest wait is for rank 0 to train a tokenizer. If a process dies, torchrun ends the other processes at once.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Devices:
    """All devices of a run, as seen from one process."""

    device: torch.device  # the device of this process
    rank: int = 0
    size: int = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"

    @classmethod
    def alone(cls, name: str) -> "Devices":
        """The device of a run in a single process; `name` is the setting `device`."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(torch.device(auto if name == "auto" else name))

    @property
    def is_first(self) -> bool:
        """Whether this process has rank 0, which prints and writes files."""
        return self.rank == 0

    def share_of(self, num_streams: int, *, accumulate: int) -> slice:
        """The streams of this process.

        Raises:
            ConfigError: the streams cannot be divided evenly.
        """
        if num_streams % (self.size * accumulate):
            raise ConfigError(
                f"data.batch = {num_streams} cannot be cut evenly: it must be a multiple of {self.size * accumulate}, "
                f"the number of devices ({self.size}) times optim.accumulate ({accumulate})"
            )
        num_local = num_streams // self.size
        return slice(self.rank * num_local, (self.rank + 1) * num_local)

    def spread(self, module: nn.Module, *, parts: Sequence[nn.Module], kept: Iterable[nn.Parameter]) -> nn.Module:
        """Put a module on the devices; call the returned module in its place.

        After a backward pass the gradients are means over the devices, except as `average` says.

        Args:
            parts: with sharded weights (FSDP), the submodules whose weights are gathered one submodule at a time.
            kept: parameters that are never sharded, because code outside the forward pass reads them.
        """
        if self.size == 1 or self.parallel == "ddp":
            module.to(self.device)
            return module if self.size == 1 else DistributedDataParallel(module, gradient_as_bucket_view=True)
        # These imports take a second, so only a run with sharded weights makes them; likewise in `cut_like`.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        kept = set(kept)
        for parameter in kept:
            parameter.data = parameter.data.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.size,))
        for part in (*parts, module):  # from the CPU, part by part: the whole module need not fit on a device
            fully_shard(part, mesh=mesh, ignored_params=kept)
        return module

    def hold_back(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context in which a backward pass does not exchange gradients; a later pass exchanges their sum.

        FSDP exchanges them in every pass, because gradients that are not exchanged would be unsharded.
        """
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average over the devices the gradients of the parameters that FSDP does not shard (`kept` in `spread`)."""
        if self.size == 1 or self.parallel == "ddp":
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        means = torch.split(flat / self.size, [gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def sum(self, number: float) -> float:
        """The sum of the numbers of all devices, in double precision."""
        return self._reduced([number], dist.ReduceOp.SUM)[0]

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is true on at least one device, so that all devices decide alike."""
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
        """Concatenate [n, ...] of all devices by rank: [W n, ...] on the CPU of rank 0, empty on other ranks."""
        if self.size == 1:
            return rows
        rows = rows.detach().cpu().contiguous()
        received = [torch.empty_like(rows) for _ in range(self.size)] if self.is_first else None
        dist.gather(rows, received)
        return rows[:0] if received is None else torch.cat(received)

    def wait(self) -> None:
        """Wait until every process has called this method."""
        self.sum(0.0)

    def say(self, line: str) -> None:
        """Print a line on rank 0 only."""
        if self.is_first:
            print(line, flush=True)


@contextmanager
def join(config: RunConfig) -> Iterator[Devices]:
    """A context with the devices of a run: all devices that torchrun started processes for, or one device.

    Raises:
        ConfigError: the settings do not fit the number of devices, or a process has no device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun sets it
    if size == 1:
        yield Devices.alone(config.device)
        return
    device = _local_device(config, local_rank=int(os.environ["LOCAL_RANK"]), size=size)
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
    # No barrier after an exception: other processes may wait for a message that never comes, and end when this process
    # ends. The group is never destroyed: freeing it holds the interpreter's lock while waiting for gloo's thread, which
    # may wait for that lock (torch 2.13). The group ends with the process.
    dist.barrier()


def leave(status: int) -> NoReturn:
    """End this process; under torchrun without the interpreter's clean-up, which would free the group, see `join`."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_cut(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over the devices (a torch.distributed.tensor.DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on every device; any other tensor unchanged."""
    return tensor.full_tensor() if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def cut_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A copy of `tensor` (equal on all devices) on the device of `other`, sharded as `other` is, if it is sharded."""
    if not is_cut(other):
        return tensor.to(other.device, copy=True)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    cut = distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
    return cut.clone()  # a clone, so that the shard does not keep the whole tensor alive


def _local_device(config: RunConfig, *, local_rank: int, size: int) -> torch.device:
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

"""Processes for tests that start many: forks of one that has imported torch, a tenth of a second instead of seconds."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",  # which the first backward pass would import
        "torch.distributed.fsdp",
        "torch.nn.parallel.distributed",
        "torch.utils.tensorboard",
        "training.plots",
        "training.run",
    ]
)


def start(target: Callable[..., Any], *args: Any, quiet: Path | None = None) -> ForkServerProcess:
    """A process that calls `target`; what it says goes to the file `quiet`."""
    process = CONTEXT.Process(target=_say_into, args=(quiet, target, args), daemon=True)
    process.start()
    return process


def start_ranks(size: int, target: Callable[..., Any], *args: Any, quiet: Path) -> list[ForkServerProcess]:
    """As torchrun starts processes: `target(*args)` in each, which may find the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(_with_environment, _rank(rank, size=size, port=port), target, args, quiet=quiet.with_suffix(f".{rank}"))
        for rank in range(size)
    ]


def end(*processes: BaseProcess, within: float = 120) -> list[int | None]:
    """Wait for processes and return their exit codes; None for one that still ran, which is then killed."""
    for process in processes:
        process.join(within)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _rank(rank: int, *, size: int, port: int) -> dict[str, str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _with_environment(environment: dict[str, str], target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    target(*args)


def _say_into(quiet: Path | None, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if quiet is not None:
        with quiet.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    target(*args)

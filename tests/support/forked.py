"""Processes for tests that start many: forks of a process with torch imported; each starts in a tenth of a second."""

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
        "torch._dynamo",  # the first backward pass would import it
        "torch.distributed.fsdp",
        "torch.nn.parallel.distributed",
        "torch.utils.tensorboard",
        "training.plots",
        "training.run",
    ]
)


def start(target: Callable[..., Any], *args: Any, quiet: Path | None = None) -> ForkServerProcess:
    """Start a process that calls `target`; its output goes to the file `quiet`."""
    process = CONTEXT.Process(target=_say_into, args=(quiet, target, args), daemon=True)
    process.start()
    return process


def start_ranks(size: int, target: Callable[..., Any], *args: Any, quiet: Path) -> list[ForkServerProcess]:
    """Start processes as torchrun does: each calls `target(*args)` and can connect to the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(_with_environment, _rank(rank, size=size, port=port), target, args, quiet=quiet.with_suffix(f".{rank}"))
        for rank in range(size)
    ]


def end(*processes: BaseProcess, within: float = 120) -> list[int | None]:
    """Wait for processes and return their exit codes; kill a process that still runs, and return None for it."""
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

"""kill -9 at any moment: the checkpoint on the disk is whole and no older than reported, and the run resumes."""

import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from model.bundle import BundleError, open_bundle
from tests.support import forked
from training.checkpoint import load_best, load_latest, save_best, save_checkpoint
from training.corpus import SHAKESPEARE
from training.record import read_metrics
from training.run import main

SETTINGS = {"seed": 1}
CONFIG = """
out = "{folder}/bundle"
device = "cpu"
[model]
num_layers = 2
width = 16
num_heads = 2
num_persistent = 8
max_span = 48
span_init = 0.3
dropout = 0.1
[data]
path = "{folder}/text.txt"
batch = 4
block = 16
reset_prob = 0.2
cache_dir = "{folder}/cache"
[optim]
lr = 0.01
max_steps = 40
[eval]
every_steps = 7
tokens = 500
[checkpoint]
every_seconds = 1e-9
"""


def state(step: int) -> dict[str, Any]:
    return {"step": step, "config": SETTINGS, "weights": torch.full((300_000,), float(step))}


def write_for_ever(folder: Path, told: Connection, first: int) -> None:
    """Write checkpoints and report each; every third is also the best."""
    for step in range(first, 10**6):
        save_checkpoint(folder, state(step), keep=2)
        told.send(("step", step))
        if step % 3 == 0:
            save_best(folder, state(step))
            told.send(("best", step))


def last_told(receiver: Connection) -> dict[str, int]:
    told: dict[str, int] = {}
    try:
        while receiver.poll(0):
            told |= [receiver.recv()]
    except EOFError:
        pass
    return told


def assert_whole(found: dict[str, Any] | None, at_least: int) -> int:
    assert found is not None
    assert found["step"] >= at_least
    assert torch.equal(found["weights"], torch.full((300_000,), float(found["step"])))
    step: int = found["step"]
    return step


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, 30])
def test_a_process_killed_while_it_writes_costs_nothing_that_was_told(kills: int, tmp_path: Path) -> None:
    moments, newest, best = random.Random(kills), 0, 0
    for _ in range(kills):
        receiver, sender = forked.CONTEXT.Pipe(duplex=False)
        process = forked.start(write_for_ever, tmp_path, sender, newest + 1)
        sender.close()
        assert receiver.poll(60)
        time.sleep(moments.uniform(0, 0.3))
        forked.end(process, within=0)
        told = last_told(receiver)
        newest = assert_whole(
            load_latest(tmp_path, config=SETTINGS), told["step"]
        )  # a damaged file would cause a warning
        if best or "best" in told:
            best = assert_whole(load_best(tmp_path), told.get("best", best))
        assert len(list(tmp_path.glob("step-*.pt"))) <= 3  # two are kept; the kill may come before the third is deleted


def write_config(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_bytes(SHAKESPEARE.read_bytes()[:12_000])
    path = folder / "run.toml"
    path.write_text(CONFIG.format(folder=folder))
    return path


def train(config: Path, *flags: str) -> None:
    raise SystemExit(main([str(config), *flags]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run without interruption."""
    config = write_config(tmp_path_factory.mktemp("undisturbed"))
    process = forked.start(train, config, quiet=config.parent / "said")
    assert forked.end(process) == [0], (config.parent / "said").read_text()
    return weights(config.parent)


def weights(folder: Path) -> bytes:
    return (open_bundle(folder / "bundle").path / "model.safetensors").read_bytes()


def newest_step(folder: Path) -> int:
    steps = [int(path.stem.removeprefix("step-")) for path in folder.glob("bundle.run/checkpoints/step-*.pt")]
    return max(steps, default=0)


def kill_when(config: Path, ready: Callable[[], bool], *, after: float) -> None:
    """Start the run and kill it `seconds` after it is ready; it may have ended before."""
    process = forked.start(train, config, quiet=config.parent / "said")
    while process.is_alive() and not ready():
        time.sleep(0.002)
    process.join(after)
    process.kill()
    process.join()


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_weights_bit_for_bit(undisturbed: bytes, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    moments = random.Random(5)
    for _ in range(8):
        before = newest_step(tmp_path)
        kill_when(config, lambda: newest_step(tmp_path) > before, after=moments.uniform(0, 0.15))  # noqa: B023
        assert newest_step(tmp_path) > before
        if newest_step(tmp_path) > 30:
            break
    process = forked.start(train, config, quiet=tmp_path / "said")
    assert forked.end(process) == [0], (tmp_path / "said").read_text()
    assert weights(tmp_path) == undisturbed
    metrics = read_metrics(tmp_path / "bundle.run")
    assert [line["step"] for line in metrics if line["kind"] == "valid"] == [7, 14, 21, 28, 35, 40]
    assert "cannot be read" not in (tmp_path / "said").read_text()


@pytest.mark.slow
def test_a_run_killed_while_it_publishes_leaves_a_whole_bundle_or_goes_on_to_it(
    undisturbed: bytes, tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    moments = random.Random(7)
    for _ in range(5):
        kill_when(config, lambda: newest_step(tmp_path) == 40, after=moments.uniform(0, 1.5))
        try:
            assert weights(tmp_path) == undisturbed
        except BundleError:
            assert not (tmp_path / "bundle").exists()
            assert newest_step(tmp_path) == 40
    process = forked.start(train, config, quiet=tmp_path / "said")
    assert forked.end(process) == [0], (tmp_path / "said").read_text()
    assert weights(tmp_path) == undisturbed
    assert not (tmp_path / "bundle.run" / "checkpoints").exists()

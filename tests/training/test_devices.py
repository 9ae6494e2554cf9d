"""Several devices give the same numbers as one: two processes over gloo, DDP or FSDP, stopped and resumed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from model.bundle import open_bundle
from tests.support import forked
from training.config import ConfigError, load_config
from training.corpus import SHAKESPEARE
from training.devices import Devices, is_cut, join
from training.loop import NonFiniteLossError, Run
from training.record import read_metrics
from training.run import begin, read, save

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
[data]
path = "{folder}/text.txt"
batch = 8
block = 16
reset_prob = 0.2
cache_dir = "{folder}/cache"
[optim]
lr = 0.01
max_steps = 100000
span_penalty = 1e-3
grad_clip = 0.2
[eval]
every_steps = 4
tokens = 500
[checkpoint]
every_seconds = 1e9
"""
STEPS = 6
NUM_SPANS = 4
Curve = list[tuple[float, float]]  # of each step: nats per token, norm of the gradient


def write_config(folder: Path) -> Path:
    (folder / "text.txt").write_bytes(SHAKESPEARE.read_bytes()[:12_000])
    path = folder / "run.toml"
    path.write_text(CONFIG.format(folder=folder))
    return path


def steps(config: Path, flags: Sequence[str], num_steps: int, into: Path) -> None:
    """The work of each process: start or resume, step, save; writes its curve and the weights to a file."""
    settings = load_config([str(config), *flags])
    with join(settings) as devices:
        run = begin(settings, read(settings, devices), devices)
        curve = []
        for _ in range(num_steps):
            report = run.step()
            curve.append((report.loss, report.gradient_norm))
        valid = run.loss_on(run.streams._lines.ravel()[:1000])
        save(run)
        noise = torch.rand(1).item()
        found = {"curve": curve, "valid": valid, "noise": noise, "weights": run.weights(), "held": num_held(run)}
        torch.save(found, into.with_suffix(f".{devices.rank}"))


def num_held(run: Run) -> int:
    """Number of weights that this process holds."""
    return sum((p.to_local() if is_cut(p) else p).numel() for p in run.network.parameters())


def together(size: int, folder: Path, *flags: str, num_steps: int = STEPS, config: Path | None = None) -> list[Any]:
    """The results of the processes by rank; the checkpoint is in `folder`."""
    folder.mkdir(exist_ok=True)
    into = folder / "found"
    out = ("--out", str(folder / "bundle"))
    arguments = (config or write_config(folder), (*out, *flags), num_steps, into)
    if size == 1:
        steps(*arguments)
    else:
        codes = forked.end(*forked.start_ranks(size, steps, *arguments, quiet=folder / "said"))
        assert codes == [0] * size, (folder / "said.0").read_text() + (folder / "said.1").read_text()
    return [torch.load(into.with_suffix(f".{rank}")) for rank in range(size)]


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for ours, theirs in zip(found["curve"], expected["curve"][-len(found["curve"]) :], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    assert found["valid"] == pytest.approx(expected["valid"], rel=2e-5)
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-3, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("devices"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, config: Path) -> dict[str, Any]:
    """For each optimizer, the results of a single process."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: together(1, folder / name, "--optim.name", name, config=config)[0]
        for name in ("adamw", "adagrad", "muon")
    }


@pytest.mark.parametrize(
    ("name", "parallel", "accumulate"),
    [
        ("adamw", "ddp", 2),
        ("adamw", "fsdp", 2),
        pytest.param("adamw", "ddp", 1, marks=pytest.mark.slow),
        pytest.param("adamw", "fsdp", 1, marks=pytest.mark.slow),
        pytest.param("adagrad", "fsdp", 1, marks=pytest.mark.slow),
        pytest.param("adagrad", "ddp", 1, marks=pytest.mark.slow),
        pytest.param("muon", "ddp", 4, marks=pytest.mark.slow),
    ],
)
def test_two_devices_learn_as_one_does(
    name: str, parallel: str, accumulate: int, config: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    flags = ("--optim.name", name, "--parallel", parallel, "--optim.accumulate", str(accumulate))
    found = together(2, tmp_path, *flags, config=config)
    assert_same_run(found[0], alone[name])
    assert found[1]["curve"] == found[0]["curve"]
    assert found[1]["valid"] == found[0]["valid"]
    copies = alone[name]["held"] if parallel == "ddp" else NUM_SPANS
    assert sum(one["held"] for one in found) == alone[name]["held"] + copies
    assert all(torch.equal(found[1]["weights"][key], tensor) for key, tensor in found[0]["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_weights_of_words_that_no_device_meets_keep_nobody_waiting(parallel: str, config: Path, tmp_path: Path) -> None:
    flags = ("--model.embedding", "adaptive", "--model.adaptive_cutoffs", "[100, 200]")  # no byte above 200 occurs
    expected = together(1, tmp_path / "one", *flags, config=config)[0]
    found = together(2, tmp_path / "two", *flags, "--parallel", parallel, config=config)
    assert_same_run(found[0], expected)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_batch_in_parts_teaches_what_it_teaches_at_once(
    name: str, config: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    found = together(1, tmp_path, "--optim.name", name, "--optim.accumulate", "4", config=config)
    assert_same_run(found[0], alone[name])


@pytest.mark.parametrize(
    ("sizes", "parallels"),
    [
        ((2, 1), ("fsdp", "ddp")),
        pytest.param((1, 2), ("ddp", "fsdp"), marks=pytest.mark.slow),
        pytest.param((2, 1), ("ddp", "ddp"), marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_number_of_devices(
    sizes: tuple[int, int], parallels: tuple[str, str], config: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    for size, parallel, accumulate in zip(sizes, parallels, ("2", "1"), strict=True):
        flags = ("--parallel", parallel, "--optim.accumulate", accumulate)
        found = together(size, tmp_path, *flags, num_steps=STEPS // 2, config=config)
    assert_same_run(found[0], alone["adamw"])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_with_the_same_number_of_devices_it_goes_on_bit_by_bit(parallel: str, config: Path, tmp_path: Path) -> None:
    flags = ("--model.dropout", "0.2", "--parallel", parallel)
    whole = together(2, tmp_path / "whole", *flags, num_steps=4, config=config)
    together(2, tmp_path / "parts", *flags, num_steps=2, config=config)
    resumed = together(2, tmp_path / "parts", *flags, num_steps=2, config=config)
    assert resumed[0]["curve"] == whole[0]["curve"][2:]
    assert whole[0]["noise"] != whole[1]["noise"]  # each device has its own random numbers
    assert [one["noise"] for one in resumed] == [one["noise"] for one in whole]
    assert all(torch.equal(resumed[0]["weights"][name], tensor) for name, tensor in whole[0]["weights"].items())


def two_end_apart(config: Path, into: Path) -> None:
    """First the loss explodes in both processes; then a process fails while the other waits for it."""
    settings = load_config([str(config), "--optim.lr", "1e38", "--out", str(into)])
    with join(settings) as devices:
        run = begin(settings, read(settings, devices), devices)
        try:
            for _ in range(5):
                run.step()
        except NonFiniteLossError as error:
            into.with_suffix(f".{devices.rank}").write_text(str(error))
        if devices.rank:
            raise SystemExit(3)
        run.step()


def test_what_one_device_cannot_do_ends_all_and_none_hangs(config: Path, tmp_path: Path) -> None:
    ranks = forked.start_ranks(2, two_end_apart, config, tmp_path / "told", quiet=tmp_path / "said")
    codes = forked.end(*ranks, within=60)
    told = [(tmp_path / f"told.{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert re.match(r"step \d: loss", told[0])
    assert codes[1] == 3
    assert codes[0] not in (0, None)


def test_streams_that_cannot_be_dealt_out_are_refused_with_the_numbers() -> None:
    devices = Devices(torch.device("cpu"), rank=1, size=2)
    assert devices.share_of(8, accumulate=4) == slice(4, 8)
    with pytest.raises(
        ConfigError, match=r"data.batch = 6 .* multiple of 4, .* devices \(2\) times .*accumulate \(2\)"
    ):
        devices.share_of(6, accumulate=2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--parallel", "fsdp", "--optim.name", "muon"), ("muon", "parallel = 'ddp'", "'adamw' or 'adagrad'")),
        (("--device", "cuda:1"), ("device = 'cuda:1'", "2 processes", "auto, cpu, cuda")),
        (("--device", "cuda"), ("process 2", "it has 1 of CUDA", "--nproc-per-node", "'cpu'")),
    ],
)
def test_settings_that_do_not_fit_many_devices_are_refused_before_anything_starts(
    flags: tuple[str, ...], words: tuple[str, ...], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught, join(load_config([str(config), *flags])):
        pass
    assert all(word in str(caught.value) for word in words)


def torchrun(config: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "training.run", str(config), *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves_and_ends_and_cut_weights_go_on_to_the_bundle(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    metrics = tmp_path / "bundle.run" / "metrics.jsonl"
    with torchrun(config) as process:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 5):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # only torchrun: its processes have other groups
        said, complained = process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGKILL)
    stopped = int(re.search(r"stopped after step (\d+)", complained)[1])  # type: ignore[index]
    assert said.count("parameters on 2 x cpu") == 1  # only one process prints
    with torchrun(config, "--optim.max_steps", str(stopped + 3), "--parallel", "fsdp") as process:
        said, complained = process.communicate(timeout=200)
    assert process.returncode == 0, complained
    assert f"going on after step {stopped}" in said
    assert f"optim.max_steps was 100000 and is {stopped + 3} from now on" in said
    assert said.count("make serve") == 1
    assert open_bundle(tmp_path / "bundle").training["steps"] == stopped + 3
    trained = [line["step"] for line in read_metrics(metrics) if line["kind"] == "train" and line["step"] <= 1000]
    assert trained == list(range(1, min(1000, stopped + 3) + 1))

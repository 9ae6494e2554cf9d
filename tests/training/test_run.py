"""`python -m training.run` as a person runs it: to the end, interrupted, killed, and with an exploding loss."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import open_bundle
from model.network.network import AllAttentionLM
from training.checkpoint import load_best, save_best
from training.config import load_config
from training.corpus import SHAKESPEARE
from training.loop import NonFiniteLossError, Run
from training.record import read_metrics
from training.run import best_so_far, checkpoints_of, main

CONFIG = """
out = "{folder}/bundle"
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
warmup_steps = 5
schedule = "cosine"
max_steps = 20
span_penalty = 1e-4
[eval]
every_steps = 10
tokens = 500
[checkpoint]
every_seconds = 1e-9
keep = 30
"""


def write_config(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_bytes(SHAKESPEARE.read_bytes()[:12_000])
    path = folder / "run.toml"
    path.write_text(CONFIG.format(folder=folder))
    return path


def command(config: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "training.run", str(config), *flags]


def run(config: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(config, *flags), capture_output=True, text=True, check=False)


def interrupt(config: Path, *, after_step: int, signal_number: int) -> tuple[int, str]:
    """Start a run, send a signal when a checkpoint exists, and return the exit status and the output."""
    checkpoint = config.parent / "bundle.run" / "checkpoints" / f"step-{after_step:09d}.pt"
    with subprocess.Popen(command(config), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.exists():
            assert process.poll() is None, "the run ended too early"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal_number)
        _, said = process.communicate()
    return process.returncode, said


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The bundle of a run without interruption, and its output."""
    config = write_config(tmp_path_factory.mktemp("whole"))
    return config.parent / "bundle", run(config)


def weights(bundle: Path) -> bytes:
    return (bundle / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_ends_in_a_bundle_and_the_command_that_serves_it(whole):
    bundle, ended = whole
    assert ended.returncode == 0, ended.stderr
    assert f"make serve BUNDLE={bundle}" in ended.stdout
    assert re.search(r"valid: \d+\.\d+ bits/byte", ended.stdout)
    assert "bits/byte" in ended.stderr
    assert "tokens/s" in ended.stderr
    assert not (bundle.parent / "bundle.run" / "checkpoints").exists()
    opened = open_bundle(bundle)
    assert opened.training["tokens_seen"] == 20 * 4 * 16
    assert set(opened.training["splits"]) == {"valid", "test"}
    assert "bits per byte" in opened.card
    network = AllAttentionLM(opened.config)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in opened.tensors().items()})


@pytest.mark.slow
def test_killed_after_ten_steps_and_resumed_gives_the_same_weights_bit_for_bit(whole, tmp_path):
    config = write_config(tmp_path / "killed")
    status, _ = interrupt(config, after_step=10, signal_number=signal.SIGKILL)
    assert status == -signal.SIGKILL
    ended = run(config)
    assert ended.returncode == 0, ended.stderr
    assert int(re.search(r"going on after step (\d+)", ended.stdout)[1]) >= 10
    assert weights(tmp_path / "killed" / "bundle") == weights(whole[0])


@pytest.mark.slow
def test_sigint_saves_and_exits_and_the_same_command_goes_on(whole, tmp_path):
    config = write_config(tmp_path / "interrupted")
    status, said = interrupt(config, after_step=3, signal_number=signal.SIGINT)
    assert status == 130, said
    stopped = int(re.search(r"stopped after step (\d+)", said)[1])
    assert "Traceback" not in said
    ended = run(config)
    assert f"going on after step {stopped}" in ended.stdout
    assert weights(tmp_path / "interrupted" / "bundle") == weights(whole[0])


@pytest.mark.slow
def test_another_setting_refuses_to_go_on_and_a_moved_cache_does_not(tmp_path):
    config = write_config(tmp_path / "changed")
    interrupt(config, after_step=3, signal_number=signal.SIGKILL)
    refused = run(config, "--optim.lr", "0.02")
    assert refused.returncode == 1
    assert "optim.lr was 0.01 and is 0.02" in refused.stderr
    assert "Traceback" not in refused.stderr
    moved = run(config, "--data.cache_dir", str(tmp_path / "elsewhere"))
    assert "going on after step" in moved.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optim.lr", "1e38"], ["step", "optim.lr", "1e+38"]),
        (["--optim.lrr", "1"], ["optim.lrr"]),
        (["--data.path", "nowhere.txt"], ["nowhere.txt"]),
    ],
)
def test_what_cannot_go_on_is_one_clear_line(tmp_path, flags, words):
    ended = run(write_config(tmp_path / "bad"), *flags)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    message = ended.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for word in words:
        assert word in message


def small_run(tmp_path: Path) -> Run:
    config = load_config([str(write_config(tmp_path / "small"))])
    torch.manual_seed(0)
    tokens = np.frombuffer(SHAKESPEARE.read_bytes()[:4000], np.uint8)
    return Run(config, AllAttentionLM(config.model.with_vocabulary(256)), tokens)


def test_a_non_finite_loss_stops_before_the_update(tmp_path):
    training = small_run(tmp_path)
    training.step()
    with torch.no_grad():
        training.network.output.bias[3] = float("inf")
    before = {name: tensor.clone() for name, tensor in training.network.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match="step 2: loss"):
        training.step()
    for name, tensor in training.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert training.step_count == 1


def test_a_restored_run_takes_the_very_same_steps(tmp_path):
    first = small_run(tmp_path)
    for _ in range(4):
        first.step()
    state = copy.deepcopy(first.state())
    expected = [first.step().loss for _ in range(4)]
    second = small_run(tmp_path)
    second.restore(state)
    assert [second.step().loss for _ in range(4)] == expected


def test_spans_stay_in_bounds_and_a_strong_penalty_shrinks_them(tmp_path):
    def train(penalty: float) -> float:
        training = small_run(tmp_path)
        optim = training.config.optim.model_copy(update={"span_penalty": penalty})
        object.__setattr__(training, "config", training.config.model_copy(update={"optim": optim}))
        for _ in range(15):
            training.step()
        spans = torch.cat([layer.span.detach() for layer in training.network.layers])
        assert spans.min() >= 0
        assert spans.max() <= 1
        return float(spans.mean())

    assert train(1.0) < train(0.0)


def test_the_validation_loss_is_nats_per_token(tmp_path):
    training = small_run(tmp_path)
    with torch.no_grad():
        training.network.output.weight.zero_()
        training.network.output.bias.zero_()
    tokens = np.frombuffer(SHAKESPEARE.read_bytes()[4000:6000], np.uint8)
    assert training.loss_on(tokens) == pytest.approx(np.log(256), rel=1e-5)


def test_the_best_weights_are_published_and_an_older_record_begins_anew(tmp_path, capsys):
    config = write_config(tmp_path / "worse")
    flags = ["--optim.lr", "1.0", "--optim.warmup_steps", "60", "--optim.schedule", "constant"]
    flags += ["--eval.every_steps", "4", "--optim.max_steps", "22", "--checkpoint.every_seconds", "1e9"]
    for _ in range(2):
        assert main([str(config), *flags]) == 0
        said = capsys.readouterr().out
        metrics = read_metrics(tmp_path / "worse" / "bundle.run")
        assert [line["step"] for line in metrics if line["kind"] == "train"] == list(range(1, 23))
        looks = {line["step"]: line["nats_per_token"] for line in metrics if line["kind"] == "valid"}
        assert list(looks) == [4, 8, 12, 16, 20, 22]
        best = min(looks, key=looks.__getitem__)
        assert best < 22
        assert said.count(f"that of step {best} was the best") == 1
        opened = open_bundle(tmp_path / "worse" / "bundle")
        assert opened.training["weights_of_step"] == best
        assert opened.training["splits"]["valid"]["bits_per_token"] * np.log(2) == pytest.approx(looks[best], abs=0.3)
        assert "plots/loss.png" in opened.card


def test_a_best_that_was_measured_otherwise_or_is_of_another_run_does_not_count(tmp_path):
    training = small_run(tmp_path)
    folder = checkpoints_of(training.config)

    def best(*, tokens: int, step_count: int) -> float:
        save_best(folder, {"step": 3, "valid": 2.5, "tokens": tokens, "network": {}})
        training.step_count = step_count
        return best_so_far(training)

    assert best(tokens=500, step_count=5) == 2.5
    assert load_best(folder) is not None
    assert best(tokens=400, step_count=5) == np.inf
    assert load_best(folder) is None
    assert best(tokens=500, step_count=0) == np.inf
    assert load_best(folder) is None


@pytest.mark.slow
def test_a_bundle_keeps_every_setting_of_its_run(whole):
    facts = json.loads((whole[0] / "config.json").read_text())["training"]
    assert facts["run"]["optim"]["lr"] == 0.01
    assert facts["run"]["seed"] == 1
    assert os.fspath(whole[0].parent) not in json.dumps(facts["splits"])

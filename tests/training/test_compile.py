"""Options that compute the same run: compiled layers, recomputed activations, cached keys, bfloat16."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from model.network.network import AllAttentionLM
from training.config import load_config
from training.loop import Run

TOKENS = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint16)
CONFIG = """
out = "none"
device = "cpu"
[model]
num_layers = 1
width = 16
num_heads = 2
num_persistent = 4
max_span = 40
span_init = 0.4
[data]
name = "shakespeare"
batch = 4
block = 16
reset_prob = 0.2
[optim]
lr = 0.01
max_steps = 100
"""


def losses(folder: Path, *flags: str) -> list[float]:
    path = folder / "run.toml"
    path.write_text(CONFIG)
    config = load_config([str(path), *flags])
    torch.manual_seed(1)
    run = Run(config, AllAttentionLM(config.model.with_vocabulary(50)), TOKENS)
    return [run.step().loss for _ in range(4)] + [run.loss_on(TOKENS[:500])]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for torch.compile: make compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
def test_a_compiled_run_has_the_same_losses(tmp_path):
    plain = losses(tmp_path)
    assert losses(tmp_path, "--compile", "true") == pytest.approx(plain, rel=1e-5)
    assert losses(tmp_path, "--compile", "true", "--checkpoint_activations", "true") == pytest.approx(plain, rel=1e-5)


def test_a_run_that_computes_layers_again_has_the_same_losses(tmp_path):
    assert losses(tmp_path, "--checkpoint_activations", "true") == pytest.approx(losses(tmp_path), rel=1e-6)


def test_in_bfloat16_the_caches_are_kept_in_it_and_the_losses_stay_close(tmp_path):
    plain = losses(tmp_path)
    assert losses(tmp_path, "--dtype", "bfloat16") == pytest.approx(plain, rel=0.02)
    config = load_config([str(tmp_path / "run.toml"), "--dtype", "bfloat16"])
    run = Run(config, AllAttentionLM(config.model.with_vocabulary(50)), TOKENS)
    run.step()
    assert {tensor.dtype for cache in run._caches for tensor in cache.layers} == {torch.bfloat16}


def test_a_run_that_keeps_keys_begins_alike_and_goes_on_from_what_the_weights_made(tmp_path):
    plain, kept = losses(tmp_path), losses(tmp_path, "--cache", "keys")
    assert kept[0] == pytest.approx(plain[0], rel=1e-6)  # the first block has no past
    assert kept == pytest.approx(plain, rel=0.01)
    assert kept[2:] != pytest.approx(plain[2:], rel=1e-7)  # cached keys come from older weights and pass no gradient on
    assert losses(tmp_path, "--cache", "keys", "--checkpoint_activations", "true") == pytest.approx(kept, rel=1e-6)

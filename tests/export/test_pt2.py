"""Tests of the compiled package: the smallest possible network passes through a C++ compiler and computes the same."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from export.run import export
from export.to_pt2 import COMPILERS
from model.artefact import ArtefactError, open_artefact
from model.backends import LoadOptions
from model.bundle import save_bundle
from model.config import ModelConfig
from model.frozen.exported import load_exported
from model.network.network import AllAttentionLM
from model.tokenizer import BytesTokenizer
from tests import oracle

TEXT = "never mind how long précisément - " * 3  # longer than the ring
CONFIG = ModelConfig(vocab_size=256, num_layers=1, width=16, num_heads=2, num_persistent=3, max_span=24, span_ramp=4)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Restore the level of a logger that compiling changes, so that other tests are not affected."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    yield
    logger.setLevel(level)


def build_network() -> AllAttentionLM:
    torch.manual_seed(3)
    network = AllAttentionLM(CONFIG).eval()
    with torch.no_grad():
        network.layers[0].span.copy_(torch.tensor([0.2, 0.9]))
    return network


@pytest.mark.slow
@pytest.mark.timeout(600)  # three compilations, on a machine that may be busy
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler: make compiler")
def test_a_compiled_package_is_verified_and_gives_the_oracle_s_logits(tmp_path: Path):
    network = build_network()
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    bundle, out, text = tmp_path / "bundle", tmp_path / "out", tmp_path / "text"
    save_bundle(bundle, config=CONFIG, tokenizer=BytesTokenizer(), tensors=tensors, card="# tiny\n", training={})
    text.write_text(TEXT)
    found = export(bundle, out, format="pt2", text=text)
    assert found.logits_difference <= 1e-4
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["kind"], manifest["opset"], manifest["weights"]) == ("pt2", None, "float32")
    assert {graph["file"] for graph in manifest["graphs"].values()} == {"decode.pt2", "extend.pt2", "logits.pt2"}

    tokens = np.array(BytesTokenizer().encode(TEXT), dtype=np.int64)[:60]
    wanted = oracle.logits(
        {name: array.astype(np.float64) for name, array in tensors.items()},
        tokens.tolist(),
        num_heads=CONFIG.num_heads,
        max_span=CONFIG.max_span,
        span_ramp=CONFIG.span_ramp,
        empty_slots=CONFIG.empty_slots,
    )
    model = load_exported(open_artefact(out), LoadOptions(device="cpu"))
    cache = model.allocate(3)
    stretch = torch.from_numpy(tokens)
    hidden, new = model.extend(stretch[None, :40], cache, [1])
    cache.commit([1], new, [40])
    parts = [model.logits(hidden[0])]
    for token in stretch[40:].tolist():
        logits, new = model.decode(torch.full((3,), token), cache)
        cache.commit([0, 1, 2], new, [0, 1, 0])
        parts.append(logits[1:2])
    assert np.abs(torch.cat(parts).numpy() - wanted).max() <= 1e-4

    program = (out / "extend.pt2").read_bytes()
    (out / "extend.pt2").write_bytes(program[: len(program) // 2])
    with pytest.raises(ArtefactError, match=r"extend\.pt2 is cut short"):
        open_artefact(out)

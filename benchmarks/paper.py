"""Write a bundle with the shape of the paper's 18-layer model and random weights, for benchmarks and comparisons."""

from pathlib import Path

import numpy as np

from model.bundle import save_bundle
from model.config import ModelConfig
from model.tokenizer import BytesTokenizer

PAPER = "paper"


def write_paper_bundle(path: Path) -> Path:
    """Write the bundle and return its path: 18 layers, 39 M random parameters, most spans short as after training."""
    config = ModelConfig(vocab_size=256, num_layers=18, width=512, num_heads=8, num_persistent=1024, max_span=224)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        tensors[name] = rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
        if name.endswith(".span"):
            tensors[name] = np.array([0.0, 0.0, 0.0, 0.1, 0.1, 0.3, 0.6, 1.0], np.float32)
        elif "norm." in name:
            tensors[name] = np.full(shape, float(name.endswith("weight")), np.float32)
    save_bundle(
        path, config=config, tokenizer=BytesTokenizer(), tensors=tensors, card="# Random weights\n", training={}
    )
    return path

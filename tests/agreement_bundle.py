"""The small bundle on which every path must agree: uneven spans, several ring sizes a layer, a byte tokenizer."""

from pathlib import Path

import numpy as np
import torch

from model.bundle import save_bundle
from model.config import ModelConfig
from model.network import AllAttentionLM
from model.tokenizer import BytesTokenizer

SPANS = ((0.0, 0.05, 0.4, 1.0), (0.1, 0.1, 0.9, 0.0), (1.0, 1.0, 1.0, 1.0))
TEXT = "Call me Ishmael. Some years ago - never mind how long précisément - " * 5  # beyond every span


def build_network(empty_slots: str = "masked") -> AllAttentionLM:
    """A network whose every part matters, with scores of the order of 1."""
    config = ModelConfig(
        vocab_size=256,
        num_layers=len(SPANS),
        width=32,
        num_heads=4,
        num_persistent=6,
        max_span=160,
        span_ramp=8,
        empty_slots=empty_slots,
    )
    torch.manual_seed(11)
    network = AllAttentionLM(config).eval()
    with torch.no_grad():
        for layer, span in zip(network.layers, SPANS, strict=True):
            layer.span.copy_(torch.tensor(span))
            layer.norm.weight.normal_(1, 0.2)
            layer.norm.bias.normal_(0, 0.2)
        network.output.weight.normal_(0, 0.4)
    return network


def write_bundle(path: Path, empty_slots: str = "masked") -> Path:
    """The network as a bundle."""
    network = build_network(empty_slots)
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    save_bundle(
        path, config=network.config, tokenizer=BytesTokenizer(), tensors=tensors, card="# agreement\n", training={}
    )
    return path


def text_tokens(length: int) -> np.ndarray:
    """The first tokens of TEXT, [length] int64."""
    return np.frombuffer(TEXT.encode(), np.uint8)[:length].astype(np.int64)

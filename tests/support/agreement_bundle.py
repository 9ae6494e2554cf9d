"""The small bundles on which every path must agree: many spans, several ring sizes a layer, bytes or words."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.bundle import save_bundle
from model.config import ModelConfig
from model.network.network import AllAttentionLM
from model.tokenizer import BytesTokenizer, Tokenizer, train_words

KINDS = ("masked", "zero", "words")  # bytes with each sort of empty slots; words in clusters, with masked empty slots
SPANS = ((0.0, 0.05, 0.4, 1.0), (0.1, 0.1, 0.9, 0.0), (1.0, 1.0, 1.0, 1.0))
TEXT = "Call me Ishmael. Some years ago - never mind how long précisément - " * 5  # longer than every span
ADAPTIVE: dict[str, Any] = {"embedding": "adaptive", "adaptive_cutoffs": (5, 9), "adaptive_div": 4}


@cache
def text_of(kind: str) -> str:
    """Return a text longer than every span; the text of words has 20 different words, most of which are rare."""
    if kind != "words":
        return TEXT
    words = [*TEXT.replace("-", "\n").split(" ")[:-1], "so", "it", "was", "and", "is", "not", "over", "yet", "."]
    ranks = np.random.default_rng(8).zipf(1.4, size=400) % len(words)
    return " ".join([*words, *(words[rank] for rank in ranks)])


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Return the tokenizer of a bundle."""
    return train_words([text_of(kind)], vocab_size=20) if kind == "words" else BytesTokenizer()


def build_network(kind: str = "masked") -> AllAttentionLM:
    """Return a network in which every part changes the output; attention scores are of the order of 1."""
    config = ModelConfig(
        vocab_size=20 if kind == "words" else 256,
        num_layers=len(SPANS),
        width=32,
        num_heads=4,
        num_persistent=6,
        max_span=160,
        span_ramp=8,
        empty_slots="zero" if kind == "zero" else "masked",
        **(ADAPTIVE if kind == "words" else {}),
    )
    torch.manual_seed(11)
    network = AllAttentionLM(config).eval()
    with torch.no_grad():
        for layer, span in zip(network.layers, SPANS, strict=True):
            layer.span.copy_(torch.tensor(span))
            layer.norm.weight.normal_(1, 0.2)
            layer.norm.bias.normal_(0, 0.2)
        if kind != "words":
            network.output.weight.normal_(0, 0.4)
    return network


def write_bundle(path: Path, kind: str = "masked") -> Path:
    """Write the network as a bundle and return its path."""
    network = build_network(kind)
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    save_bundle(
        path, config=network.config, tokenizer=tokenizer_of(kind), tensors=tensors, card="# agreement\n", training={}
    )
    return path


def text_tokens(length: int, kind: str = "masked") -> np.ndarray:
    """Return the first tokens of the text, [length] int64."""
    return np.array(tokenizer_of(kind).encode(text_of(kind))[:length], dtype=np.int64)

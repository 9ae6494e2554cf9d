"""Models for the tests of the native step: the small bundles, and a network whose heads fill whole tiles and chunks."""

from functools import cache

import numpy as np
import torch

from model.config import ModelConfig
from model.frozen.native.lm import NativeLM
from model.network.network import AllAttentionLM
from tests.support.agreement_bundle import build_network

SPANS = ((0.0, 1.0), (0.3, 0.8))
VOCAB = 300


@cache
def tiled_network(empty_slots: str = "masked") -> AllAttentionLM:
    """Return a network with two heads of size 64: its products have several groups of 64, its scores several blocks."""
    config = ModelConfig(
        vocab_size=VOCAB,
        num_layers=len(SPANS),
        width=128,
        num_heads=2,
        num_persistent=100,
        max_span=90,
        span_ramp=8,
        empty_slots=empty_slots,  # type: ignore[arg-type]
    )
    torch.manual_seed(5)
    network = AllAttentionLM(config).eval()
    with torch.no_grad():
        for layer, span in zip(network.layers, SPANS, strict=True):
            layer.span.copy_(torch.tensor(span))
            layer.norm.bias.normal_(0, 0.2)
        network.output.weight.normal_(0, 0.3)
    return network


def native(network: AllAttentionLM, **choices) -> NativeLM:
    """Return the network as the native step runs it; see `NativeLM` for the choices."""
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    return NativeLM(network.config, tensors, **{"num_threads": 2, **choices})


@cache
def small_native(kind: str) -> NativeLM:
    """Return a bundle of agreement_bundle in the native step, in float32."""
    return native(build_network(kind))


def random_tokens(count: int, *, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(vocab, size=count))

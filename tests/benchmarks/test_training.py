"""Tests of the training benchmark's peers: the naive formulation gives our numbers, the GPT has the same size."""

import pytest
import torch

from benchmarks.training import Gpt, NaiveLM
from model.config import ModelConfig
from model.network.network import AllAttentionLM, StreamCache

CONFIG = ModelConfig(
    vocab_size=50, num_layers=2, width=32, num_heads=4, num_persistent=6, max_span=48, span_init=0.4, empty_slots="zero"
)


def test_the_naive_formulation_is_the_same_network():
    torch.manual_seed(0)
    network = AllAttentionLM(CONFIG).double()
    tokens = torch.randint(50, (3, 3, 17))
    caches = [torch.zeros(3, 48, 32, dtype=torch.float64) for _ in network.layers]
    cache = StreamCache(tuple(caches), torch.zeros(3, dtype=torch.int64))
    naive = NaiveLM(network)
    for block in tokens:
        inputs, targets = block[:, :-1], block[:, 1:]
        network.zero_grad()
        theirs, caches = naive(inputs, targets, caches)
        theirs.backward()
        slopes = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
        network.zero_grad()
        hidden, cache = network(inputs, cache)
        ours = network.loss(hidden, targets) / targets.numel()
        ours.backward()
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
        for name, parameter in network.named_parameters():
            assert torch.allclose(parameter.grad, slopes[name], atol=1e-6), name


def test_the_gpt_has_as_many_parameters_give_or_take_half_a_layer():
    config = ModelConfig(vocab_size=4096, num_layers=6, width=256, num_heads=4, num_persistent=512, max_span=512)
    gpt = Gpt(config)
    assert sum(p.numel() for p in gpt.parameters()) == pytest.approx(config.num_parameters, rel=0.08)
    tokens = torch.randint(4096, (2, 64))
    with torch.no_grad():
        before = gpt.blocks(gpt.tokens(tokens))[:, :32]
        tokens[:, 32:] = 1
        assert torch.allclose(gpt.blocks(gpt.tokens(tokens))[:, :32], before, atol=1e-5)  # no token sees later tokens

"""The share of attention on persistent vectors, against the equations, one probability at a time.

On every backend.
"""

import numpy as np
import pytest
import torch

from model.frozen.baked import bake
from model.frozen.served import ServedLM
from tests import oracle
from tests.support.agreement_bundle import build_network, text_tokens
from tests.support.artefacts import EACH_BACKEND, served_model

LENGTH = 190  # beyond the longest ring of 160
CHECKED = (0, 1, 7, 8, 9, 63, 100, 159, 160, 161, LENGTH - 1)  # positions; the loops are slow


@pytest.fixture(scope="module", params=("masked", "zero"))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def network(kind):
    return build_network(kind)


@pytest.fixture(scope="module", params=EACH_BACKEND)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind, backend) -> ServedLM:
    return served_model(kind, backend)


def slow_share(layer, hidden, position, t, config) -> float:
    """The summed probability of all persistent vectors for the query at t, mean over heads (equations 6 to 8)."""
    size, num_pairs = config.head_size, config.num_persistent
    shares = []
    for h in range(config.num_heads):
        rows = slice(h * size, (h + 1) * size)
        query = layer["query.weight"][rows] @ hidden[t] / np.sqrt(size)
        scores, masks, marks = [], [], []
        for d in range(1, config.max_span + 1):
            if d > t and config.empty_slots == "masked":
                continue
            source = hidden[t - d] if d <= t else np.zeros(config.width)
            scores.append(query @ (layer["key.weight"][rows] @ source + position[:, d - 1]))
            masks.append(oracle.span_mask(d, span=layer["span"][h], max_span=config.max_span, span_ramp=8))
            marks.append(np.zeros(1))
        for n in range(num_pairs):
            scores.append(query @ (np.sqrt(size) * layer["persistent_key"][h, n]))
            masks.append(1.0)
            marks.append(np.ones(1))
        shares.append(oracle.masked_mean(scores, masks, marks)[0])
    return float(np.mean(shares))


def layers_of(network):
    """For each layer its weights and its inputs [T, E], all in float64."""
    config = network.config
    weights = {name: tensor.double().numpy() for name, tensor in network.state_dict().items()}
    hidden = weights["embedding.weight"][text_tokens(LENGTH)]
    for i in range(config.num_layers):
        prefix = f"layers.{i}."
        layer = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        yield layer, hidden, weights["position"]
        out = oracle.attention(
            layer,
            hidden,
            weights["position"],
            num_heads=config.num_heads,
            max_span=config.max_span,
            span_ramp=config.span_ramp,
            empty_slots=config.empty_slots,
        )
        hidden = np.stack([oracle.layer_norm(row, layer["norm.weight"], layer["norm.bias"]) for row in hidden + out])


@pytest.fixture(scope="module")
def wanted(network) -> np.ndarray:
    """Shares at the checked positions, [len(CHECKED), layers]."""
    columns = [
        [slow_share(layer, hidden, position, t, network.config) for t in CHECKED]
        for layer, hidden, position in layers_of(network)
    ]
    return np.array(columns).T


def shares_in_chunks(model: ServedLM, size: int) -> np.ndarray:
    cache = model.allocate(2)
    parts = []
    for chunk in torch.from_numpy(text_tokens(LENGTH)).split(size):
        _, new, shares = model.extend_with_memory_share(chunk[None], cache, [1])
        cache.commit([1], new, [len(chunk)])
        parts.append(shares[0])
    return torch.cat(parts).numpy()


@pytest.mark.parametrize("size", [LENGTH, 64, 7])
def test_the_share_equals_the_equations_in_any_chunks(network, model, wanted, size):
    found = shares_in_chunks(model, size)
    assert found.shape == (LENGTH, network.config.num_layers)
    assert np.abs(found[list(CHECKED)] - wanted).max() < 1e-5
    assert wanted[5:].std(0).min() > 1e-3  # positions differ


def test_the_first_token_of_a_fresh_stream_attends_to_nothing_else(network, model):
    if network.config.empty_slots == "masked":
        assert np.allclose(shares_in_chunks(model, 5)[0], 1.0, atol=1e-6)


def test_rows_of_different_lengths_have_the_shares_they_have_alone(model):
    text = torch.from_numpy(text_tokens(LENGTH))
    alone = shares_in_chunks(model, LENGTH)
    cache = model.allocate(2)
    _, new = model.extend(text[None, :100], cache, [0])
    cache.commit([0], new, [100])
    both = torch.stack((text[100:150], text[:50]))
    _, _, shares = model.extend_with_memory_share(both, cache, [0, 1])
    assert np.abs(shares[0].numpy() - alone[100:150]).max() < 1e-5
    assert np.abs(shares[1].numpy() - alone[:50]).max() < 1e-5


def test_asking_for_the_share_changes_nothing_else(model):
    text = torch.from_numpy(text_tokens(LENGTH))[None]
    hidden, new = model.extend(text, model.allocate(1), [0])
    same, also, _ = model.extend_with_memory_share(text, model.allocate(1), [0])
    torch.testing.assert_close(same, hidden, atol=1e-5, rtol=1e-5)
    for left, right in zip(also, new, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def test_bf16_tells_the_share_in_fp32_numbers_with_a_small_error(network, wanted):
    found = shares_in_chunks(bake(network, dtype=torch.bfloat16), 64)
    assert np.abs(found[list(CHECKED)].astype(np.float64) - wanted).max() < 0.03

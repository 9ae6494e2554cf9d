"""The training network against the oracle: any split into blocks, gradients, streams, spans, dropout."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.attention import CHUNK
from model.config import ModelConfig
from model.network.network import AllAttentionLM, StreamCache
from tests import oracle

TOLERANCE = 1e-4  # fp32 logits, DESIGN.md section 6
SHAPE: dict[str, Any] = {
    "vocab_size": 11,
    "num_layers": 2,
    "width": 8,
    "num_heads": 2,
    "num_persistent": 3,
    "max_span": 40,
    "span_ramp": 4,
}
TOKENS = [int(token) for token in np.random.default_rng(7).integers(SHAPE["vocab_size"], size=100)]
SPANS = {
    "all zero": ((0.0, 0.0), (0.0, 0.0)),
    "all one": ((1.0, 1.0), (1.0, 1.0)),
    "mixed": ((0.0, 1.0), (0.13, 0.55)),
    "short": ((0.1, 0.02), (0.07, 0.1)),  # shorter than the maximum by more than the step that reaches are rounded to
}


class Case(NamedTuple):
    """A network of the tests; hashable, so that the slow oracle runs once for each case."""

    spans: str = "mixed"
    empty_slots: str = "masked"

    def build(self, **changes: Any) -> AllAttentionLM:
        """The network in eval mode, with random weights: every part matters, and scores are of the order of 1."""
        shape = SHAPE | {"empty_slots": self.empty_slots} | changes
        network = AllAttentionLM(ModelConfig.model_validate(shape))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                if parameter.shape == (SHAPE["width"], SHAPE["width"]):
                    parameter.div_(SHAPE["width"] ** 0.5)
                if name.endswith("norm.weight"):
                    parameter.mul_(0.3).add_(1)
            for layer, span in zip(network.layers, SPANS[self.spans], strict=True):
                layer.span.copy_(torch.tensor(span))
        return network.eval()


CASES = [Case(spans, empty_slots) for spans in SPANS for empty_slots in ("masked", "zero")]


def weights_of(network: nn.Module) -> dict[str, oracle.Array]:
    return {name: parameter.detach().double().numpy() for name, parameter in network.named_parameters()}


def by_oracle(weights: dict[str, oracle.Array], tokens: Sequence[int], config: ModelConfig) -> oracle.Array:
    return oracle.logits(
        weights,
        tokens,
        num_heads=config.num_heads,
        max_span=config.max_span,
        span_ramp=config.span_ramp,
        empty_slots=config.empty_slots,
    )


@functools.cache
def expected(case: Case) -> tuple[AllAttentionLM, oracle.Array]:
    """The network of a case, and the oracle's logits for TOKENS."""
    network = case.build()
    return network, by_oracle(weights_of(network), TOKENS, network.config)


@torch.no_grad()
def read(network: AllAttentionLM, tokens: Tensor, sizes: Sequence[int]) -> tuple[Tensor, StreamCache]:
    """Logits [B, T, V] of fresh streams `tokens` [B, T], read in blocks of `sizes`, and the last cache."""
    cache = network.init_cache(tokens.shape[0])
    parts = []
    for block in torch.split(tokens, list(sizes), dim=1):
        hidden, cache = network(block, cache)
        parts.append(network.logits(hidden))
    return torch.cat(parts, 1), cache


def random_tokens(num_streams: int, num_tokens: int) -> Tensor:
    return torch.randint(SHAPE["vocab_size"], (num_streams, num_tokens), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(100,), (1,) * 100, (41, 59), (CHUNK, 100 - CHUNK), (7,) * 14 + (2,), (1, 40, 39, 20)],
    ids=["one block", "single tokens", "longer than the span", "one chunk", "short blocks", "uneven blocks"],
)
def test_the_network_equals_the_oracle_in_every_split_into_blocks(case: Case, sizes: tuple[int, ...]) -> None:
    network, wanted = expected(case)
    logits, _ = read(network, torch.tensor([TOKENS]), sizes)
    assert np.abs(logits[0].double().numpy() - wanted).max() <= TOLERANCE


@settings(deadline=None, max_examples=20, derandomize=True)
@given(cuts=st.sets(st.integers(1, len(TOKENS) - 1), max_size=6), empty_slots=st.sampled_from(["masked", "zero"]))
def test_the_network_equals_the_oracle_wherever_a_text_is_cut(cuts: set[int], empty_slots: str) -> None:
    network, wanted = expected(Case(empty_slots=empty_slots))
    edges = [0, *sorted(cuts), len(TOKENS)]
    logits, _ = read(network, torch.tensor([TOKENS]), np.diff(edges).tolist())
    assert np.abs(logits[0].double().numpy() - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_keys_kept_the_network_equals_the_oracle_too(case: Case) -> None:
    network, wanted = expected(case)
    network.cache_keys = True
    try:
        logits, cache = read(network, torch.tensor([TOKENS]), (7,) * 14 + (2,))
    finally:
        network.cache_keys = False
    assert np.abs(logits[0].double().numpy() - wanted).max() <= TOLERANCE
    assert [tuple(layer.shape) for layer in cache.layers] == [(1, 40, 16)] * 2


def test_a_shifted_position_table_would_be_noticed() -> None:
    network, wanted = expected(Case())
    weights = weights_of(network)
    weights["position"] = np.roll(weights["position"], 1, axis=1)
    assert np.abs(by_oracle(weights, TOKENS, network.config) - wanted).max() > 1000 * TOLERANCE


@pytest.mark.parametrize("case", [case for case in CASES if case.spans != "all one"], ids=str)
def test_a_ramp_off_by_one_would_be_noticed(case: Case) -> None:
    network, wanted = expected(case)
    weights = weights_of(network)
    for name in weights:
        if name.endswith(".span"):
            weights[name] = weights[name] + 1 / network.config.max_span
    assert np.abs(by_oracle(weights, TOKENS, network.config) - wanted).max() > 100 * TOLERANCE


def test_the_treatment_of_empty_slots_would_be_noticed() -> None:
    difference = np.abs(expected(Case(empty_slots="masked"))[1] - expected(Case(empty_slots="zero"))[1])
    assert difference.max() > 1000 * TOLERANCE


def test_a_large_score_outside_the_span_changes_nothing() -> None:
    network = Case("all zero").build()
    tokens = torch.tensor([TOKENS])
    before, _ = read(network, tokens, [len(TOKENS)])
    with torch.no_grad():
        network.position[:, network.config.span_ramp + 1] *= 10  # distance R + 2, where the mask of z = 0 is zero
    after, _ = read(network, tokens, [len(TOKENS)])
    torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCE)


def test_streams_of_a_batch_do_not_influence_one_another() -> None:
    network, tokens = Case().build(), random_tokens(3, 60)
    together, _ = read(network, tokens, [25, 35])
    for row in range(3):
        alone, _ = read(network, tokens[row : row + 1], [25, 35])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=TOLERANCE)
    changed = tokens.clone()
    changed[1] = (changed[1] + 1) % SHAPE["vocab_size"]
    others, _ = read(network, changed, [25, 35])
    assert torch.equal(others[[0, 2]], together[[0, 2]])
    assert not torch.allclose(others[1], together[1], atol=0.1)


@pytest.mark.parametrize("empty_slots", ["masked", "zero"])
@torch.no_grad()
def test_a_reset_stream_equals_a_fresh_one_and_leaves_the_others_alone(empty_slots: str) -> None:
    network, tokens = Case(empty_slots=empty_slots).build(), random_tokens(3, 90)
    _, cache = read(network, tokens[:, :50], [50])
    hidden, after = network(tokens[:, 50:], cache.reset(torch.tensor([False, True, False])))
    went_on, _ = read(network, tokens, [50, 40])
    fresh, _ = read(network, tokens[:, 50:], [40])
    torch.testing.assert_close(network.logits(hidden)[1], fresh[1], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(network.logits(hidden)[[0, 2]], went_on[[0, 2], 50:], rtol=0, atol=TOLERANCE)
    assert not torch.allclose(went_on[1, 50:], fresh[1], atol=0.1)
    assert after.filled.tolist() == [40, 40, 40]


def test_resetting_no_stream_changes_nothing() -> None:
    _, cache = read(Case().build(), random_tokens(2, 9), [9])
    kept = cache.reset(torch.tensor([False, False]))
    assert all(torch.equal(a, b) for a, b in zip(kept.layers, cache.layers, strict=True))
    assert torch.equal(kept.filled, cache.filled)


def test_the_cache_holds_the_last_inputs_of_each_layer_and_counts_up_to_the_maximum_span() -> None:
    network, tokens = Case().build(), random_tokens(2, 60)
    fresh = network.init_cache(2)
    assert fresh.filled.tolist() == [0, 0]
    assert not any(hidden.any() for hidden in fresh.layers)
    _, short = read(network, tokens[:, :15], [10, 5])
    assert short.filled.tolist() == [15, 15]
    assert not short.layers[0][:, :25].any()
    torch.testing.assert_close(short.layers[0][:, 25:], network.embedding(tokens[:, :15]))
    _, full = read(network, tokens, [60])
    assert full.filled.tolist() == [40, 40]
    assert full.filled.device.type == "cpu"
    torch.testing.assert_close(full.layers[0], network.embedding(tokens[:, 20:]))
    assert [tuple(hidden.shape) for hidden in full.layers] == [(2, 40, 8)] * 2


def test_the_cache_carries_no_gradient() -> None:
    network, tokens = Case().build(), random_tokens(1, 20)
    first, cache = network(tokens[:, :10], network.init_cache(1))
    assert first.requires_grad
    assert not any(hidden.requires_grad for hidden in cache.layers)
    second, _ = network(tokens[:, 10:], cache)
    (gradient,) = torch.autograd.grad(second.sum(), network.embedding.weight)
    only_first = sorted(set(tokens[0, :10].tolist()) - set(tokens[0, 10:].tolist()))
    assert only_first
    assert not gradient[only_first].any()


def loss_by_oracle(weights: dict[str, oracle.Array], tokens: Sequence[int], config: ModelConfig) -> float:
    """Summed nats of all tokens after the first."""
    scores = by_oracle(weights, tokens[:-1], config)
    chosen = scores[np.arange(len(tokens) - 1), tokens[1:]]
    return float((np.log(np.exp(scores).sum(-1)) - chosen).sum())


@pytest.mark.parametrize("empty_slots", ["masked", "zero"])
def test_the_gradient_of_every_weight_equals_the_slope_of_the_oracles_loss(empty_slots: str) -> None:
    network = Case(empty_slots=empty_slots).build(max_span=6, span_ramp=2).double()
    tokens, step = TOKENS[:10], 1e-5
    with torch.no_grad():
        for layer, span in zip(network.layers, ((0.37, 0.61), (0.11, 0.95)), strict=True):
            layer.span.copy_(torch.tensor(span))  # between the kinks of the ramp, where derivatives exist
    hidden, _ = network(torch.tensor([tokens[:-1]]), network.init_cache(1))
    loss = nn.functional.cross_entropy(network.logits(hidden)[0], torch.tensor(tokens[1:]), reduction="sum")
    loss.backward()
    weights, rng = weights_of(network), np.random.default_rng(1)
    for name, parameter in network.named_parameters():
        direction = rng.normal(size=parameter.shape)
        up, down = (
            loss_by_oracle(weights | {name: weights[name] + sign * step * direction}, tokens, network.config)
            for sign in (1, -1)
        )
        assert parameter.grad is not None
        slope = float((parameter.grad.numpy() * direction).sum())
        assert slope == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-5), name


def test_the_span_penalty_is_the_maximum_span_times_the_mean_z_summed_over_layers() -> None:
    network = Case().build()
    penalty = network.span_penalty()
    assert penalty.item() == pytest.approx(40 * ((0.0 + 1.0) / 2 + (0.13 + 0.55) / 2))
    penalty.backward()
    for layer in network.layers:
        assert layer.span.grad is not None
        assert layer.span.grad.tolist() == [20.0, 20.0]


def test_clamping_brings_spans_back_between_zero_and_one_and_keeps_the_rest() -> None:
    network = Case().build()
    with torch.no_grad():
        network.layers[0].span.copy_(torch.tensor([-0.25, 0.5]))
        network.layers[1].span.copy_(torch.tensor([1.75, 1.0]))
    network.clamp_spans()
    assert [layer.span.tolist() for layer in network.layers] == [[0.0, 0.5], [1.0, 1.0]]
    assert all(layer.span.requires_grad for layer in network.layers)


def test_attention_dropout_falls_on_context_and_persistent_vectors_in_training_only() -> None:
    network, tokens = Case().build(dropout=0.5), random_tokens(1, 20)
    assert torch.equal(read(network, tokens, [20])[0], read(network, tokens, [20])[0])
    network.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy, again = (read(network, tokens, [20])[0] for _ in range(2))
        assert not torch.allclose(noisy[:, 0], again[:, 0], atol=1e-3)  # the first token sees persistent vectors only
        with torch.no_grad():
            for layer in network.layers:
                layer.persistent_value.zero_()
        noisy, again = (read(network, tokens, [20])[0] for _ in range(2))
        assert torch.equal(noisy[:, 0], again[:, 0])
        assert not torch.allclose(noisy[:, 1:], again[:, 1:], atol=1e-3)


def test_embedding_dropout_is_for_training_only() -> None:
    network, tokens = Case().build(embedding_dropout=0.5), random_tokens(1, 20)
    calm, _ = read(network, tokens, [20])
    torch.testing.assert_close(calm, read(Case().build(), tokens, [20])[0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.allclose(read(network.train(), tokens, [20])[0], calm, atol=1e-3)


def test_training_mode_without_dropout_changes_nothing() -> None:
    network, tokens = Case().build(), random_tokens(1, 20)
    calm, _ = read(network, tokens, [20])
    assert torch.equal(read(network.train(), tokens, [20])[0], calm)


def test_computing_layers_again_in_the_backward_pass_changes_no_gradient_and_keeps_less() -> None:
    network, tokens = Case().build(dropout=0.5).train(), random_tokens(2, 41)
    found, kept = [], []
    for again in (False, True):
        network.checkpoint_activations = again
        sizes: list[int] = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            torch.manual_seed(0)
            hidden, _ = network(tokens[:, :-1], network.init_cache(2))
            kept.append(sum(sizes))
            loss = network.loss(hidden, tokens[:, 1:])
            found.append([loss, *torch.autograd.grad(loss, list(network.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert kept[1] < kept[0] / 2


def test_parameters_have_the_names_and_shapes_that_the_config_lists() -> None:
    network = Case().build()
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == network.config.tensor_shapes()


def test_a_new_network_starts_as_the_paper_says() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AllAttentionLM(
            ModelConfig.model_validate(SHAPE | {"width": 64, "num_persistent": 256, "max_span": 512, "span_init": 0.25})
        )
    layer = network.layers[0]
    assert layer.persistent_key.std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert layer.persistent_value.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert layer.span.tolist() == [0.25, 0.25]
    assert all(getattr(layer, name).bias is None for name in ("query", "key", "value", "out"))

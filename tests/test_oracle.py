"""The oracle against cases computed by hand, and its two forms against each other."""

import numpy as np
import pytest
import torch

from tests import oracle


def hand_layer() -> dict[str, oracle.Array]:
    """One head of size 2 with identity projections and four equal persistent pairs, key (5, 0) and value (0, 1)."""
    return {f"{name}.weight": np.eye(2) for name in ("query", "key", "value", "out")} | {
        "persistent_key": np.tile([5.0, 0.0], (1, 4, 1)),
        "persistent_value": np.tile([0.0, 1.0], (1, 4, 1)),
        "span": np.zeros(1),
    }


def test_the_oracle_gives_what_two_tokens_give_by_hand() -> None:
    # The query of token 1 is (0, 1): 0 with each persistent key, so 4 units of mass; with token 0 at distance 1 it is
    # (0, 1).((1, 0) + (0, sqrt(2) ln 12)) / sqrt(2) = ln 12, so 12 units. Persistent values are scaled by sqrt(4).
    position = np.array([[0.0], [np.sqrt(2) * np.log(12)]])
    hidden = np.array([[1.0, 0.0], [0.0, 1.0]])
    out = oracle.attention(hand_layer(), hidden, position, num_heads=1, max_span=1, span_ramp=2, empty_slots="masked")
    np.testing.assert_allclose(out, np.array([[0.0, 2], [12 / 16, 4 / 16 * 2]]), atol=1e-12)


def test_the_oracle_lets_the_start_of_a_stream_take_probability_only_where_slots_are_zero() -> None:
    position = np.array([[0.0], [np.sqrt(2) * np.log(12)]])
    first = np.array([[0.0, 1.0]])  # sees an empty slot with 12 units of mass and value 0
    out = oracle.attention(hand_layer(), first, position, num_heads=1, max_span=1, span_ramp=2, empty_slots="zero")
    np.testing.assert_allclose(out, [[0, 4 / 16 * 2]], atol=1e-12)


def test_the_oracle_multiplies_by_the_ramp_and_renormalises_jointly() -> None:
    # z = 0 and R = 2: distance 1 counts whole, distance 2 half, distance 3 not at all. All scores of token 3 are 0.
    hidden = np.array([[9.0, 9.0], [4.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    out = oracle.attention(
        hand_layer(), hidden, np.zeros((2, 3)), num_heads=1, max_span=3, span_ramp=2, empty_slots="masked"
    )
    np.testing.assert_allclose(out[3], [0.5 * 4 / 5.5, 4 * 2 / 5.5], atol=1e-12)


@pytest.mark.parametrize(("span", "masks"), [(0, [1, 0.75, 0.5, 0.25, 0, 0]), (0.25, [1, 1, 1, 0.75, 0.5, 0.25])])
def test_the_oracles_mask_is_one_up_to_the_span_and_falls_over_the_ramp(span: float, masks: list[float]) -> None:
    got = [oracle.span_mask(d, span=span, max_span=8, span_ramp=4) for d in range(1, 7)]
    assert got == masks


@pytest.mark.parametrize("span", [(0.0, 0.0), (1.0, 1.0), (0.4, 0.6), (0.3, 0.77)])
@pytest.mark.parametrize("empty_slots", ["masked", "zero"])
def test_the_two_forms_of_the_oracle_agree(span: tuple[float, float], empty_slots: str) -> None:
    num_tokens, num_heads, max_span, size, rng = 9, 2, 5, 3, np.random.default_rng(0)
    width = num_heads * size
    layer = {f"{name}.weight": rng.normal(size=(width, width)) for name in ("query", "key", "value")}
    layer |= {name: rng.normal(size=(num_heads, 4, size)) for name in ("persistent_key", "persistent_value")}
    layer |= {"out.weight": np.eye(width), "span": np.array(span)}
    position, hidden = rng.normal(size=(size, max_span)), rng.normal(size=(num_tokens, width))
    loops = oracle.attention(
        layer, hidden, position, num_heads=num_heads, max_span=max_span, span_ramp=3, empty_slots=empty_slots
    )

    def projected(name: str, inputs: oracle.Array) -> torch.Tensor:
        return torch.tensor(inputs @ layer[f"{name}.weight"].T).view(-1, num_heads, size).transpose(0, 1)

    slots = np.vstack((np.zeros((max_span, width)), hidden))
    literal = oracle.attend(
        projected("query", hidden),
        projected("key", slots),
        projected("value", slots),
        position=torch.tensor(position),
        persistent_key=torch.tensor(layer["persistent_key"]),
        persistent_value=torch.tensor(layer["persistent_value"]),
        span=torch.tensor(layer["span"]),
        span_ramp=3,
        num_empty=max_span if empty_slots == "masked" else 0,
    )
    flat = literal.transpose(0, 1).reshape(num_tokens, width).numpy()
    np.testing.assert_allclose(flat, loops, rtol=0, atol=1e-6)  # the literal form adds 1e-8 to its denominators


def adaptive_weights() -> dict[str, oracle.Array]:
    """Words 0, 1 | 2, 3 | 4 in three clusters of widths 2, 1 and 1; the last cluster's entry is the first of two."""
    return {
        "embedding.tables.0.weight": np.array([[0.0, 0.0], [1.0, 0.0]]),
        "embedding.tables.1.weight": np.array([[0.0], [3.0]]),
        "embedding.tables.2.weight": np.array([[7.0]]),
        "embedding.projections.0.weight": np.array([[1.0, 0.0], [0.0, 1.0]]),
        "embedding.projections.1.weight": np.array([[1.0], [2.0]]),
        "embedding.projections.2.weight": np.array([[0.0], [1.0]]),
        "output.projections.0.weight": np.eye(2),
        "output.projections.1.weight": np.array([[0.0], [np.log(2) / 3]]),
        "output.projections.2.weight": np.array([[1.0], [1.0]]),
        "output.biases.0": np.array([0.0, np.log(2)]),
        "output.biases.1": np.array([0.0, np.log(2)]),
        "output.biases.2": np.array([5.0]),
        "output.cluster.weight": np.array([[0.0, np.log(2)], [0.0, np.log(3)]]),
        "output.cluster.bias": np.zeros(2),
    }


def test_the_oracle_projects_a_rare_words_vector_and_scales_it() -> None:
    np.testing.assert_allclose(oracle.adaptive_input(adaptive_weights(), 3), np.sqrt(2) * np.array([3.0, 6.0]))
    np.testing.assert_allclose(oracle.adaptive_input(adaptive_weights(), 4), np.sqrt(2) * np.array([0.0, 7.0]))


def test_the_oracle_gives_a_rare_word_its_clusters_probability_times_its_own() -> None:
    # Of h = (0, 1): the head has the masses 1, 2 of words and 2, 3 of the last and the second cluster; words 2 and 3
    # have the masses 1 and 2 * 2 in theirs; word 4 is alone.
    logprobs = oracle.adaptive_logprobs(adaptive_weights(), np.array([0.0, 1.0]))
    np.testing.assert_allclose(np.exp(logprobs), np.array([1, 2, 3 * 1 / 5, 3 * 4 / 5, 2]) / 8)

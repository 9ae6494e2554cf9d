"""Drawing tokens: noise from (seed, position) only, the filters against slow definitions, log-probabilities."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling import Draws, draw, target_logprobs, uniform_noise


def draws(rows=1, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    return Draws(
        temperatures=[temperature] * rows,
        top_ks=[top_k] * rows,
        top_ps=[top_p] * rows,
        min_ps=[min_p] * rows,
        seeds=range(seed, seed + rows),
    )


def slow_distribution(logits, *, temperature, top_k, top_p, min_p):
    """The kept tokens and their probabilities, by the words of the documentation."""
    weights = [math.exp(x / temperature) for x in logits]
    total = sum(weights)
    probabilities = [w / total for w in weights]
    ordered = sorted(probabilities, reverse=True)
    floor = ordered[min(top_k, len(ordered)) - 1] if top_k else 0.0
    left = [p for p in ordered if p >= floor]
    if top_p < 1:
        needed = next(n for n in range(1, len(left) + 1) if sum(left[:n]) >= top_p * sum(left) - 1e-12)
        floor = left[needed - 1]
    floor = max(floor, min_p * max(probabilities))
    kept = [p if p >= floor else 0.0 for p in probabilities]
    return [p / sum(kept) for p in kept]


def test_noise_depends_on_seed_and_position_alone_and_is_uniform():
    seeds, positions = np.arange(200, dtype=np.uint64), np.arange(200)
    grid = np.stack([uniform_noise(seeds, np.full(200, position)) for position in positions])
    assert grid.min() >= 0
    assert grid.max() < 1
    assert abs(grid.mean() - 0.5) < 0.01
    assert abs(grid.std() - math.sqrt(1 / 12)) < 0.01
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    assert uniform_noise(seeds[7:8], positions[9:10])[0] == grid[9, 7]
    assert len(np.unique(grid)) == grid.size


def test_the_largest_seed_is_accepted():
    assert 0 <= uniform_noise(np.array([2**64 - 1], dtype=np.uint64), np.array([0]))[0] < 1


@settings(max_examples=40, deadline=None)
@given(
    logits=st.lists(st.floats(-4, 4), min_size=2, max_size=12, unique_by=lambda x: round(x, 3)),
    temperature=st.floats(0.3, 2),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.2, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_drawn_frequencies_follow_the_documented_filters(logits, temperature, top_k, top_p, min_p):
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    expected = slow_distribution(logits, **filters)
    rows = 4000
    batch = torch.tensor(logits)[None].repeat(rows, 1)
    tokens, _ = draw(batch, draws(rows, **filters), range(rows))
    counts = np.bincount(tokens.numpy(), minlength=len(logits)) / rows
    for found, wanted in zip(counts, expected, strict=True):
        assert abs(found - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / rows) + 1e-9


def test_temperature_zero_takes_the_best_token_beside_random_rows():
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    mixed = Draws(temperatures=[0, 1, 0, 1, 0, 0.5], top_ks=[0] * 6, top_ps=[1] * 6, min_ps=[0] * 6, seeds=range(6))
    tokens, logprobs = draw(logits, mixed, range(6))
    assert tokens[[0, 2, 4]].tolist() == logits[[0, 2, 4]].argmax(-1).tolist()
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], atol=1e-6)


def test_a_row_draws_the_same_alone_and_among_rows_with_other_filters():
    torch.manual_seed(1)
    logits = torch.randn(5, 300)
    settings_of = {
        "temperatures": [1.0, 0.0, 0.7, 1.3, 1.0],
        "top_ks": [0, 0, 5, 0, 300],
        "top_ps": [1.0, 1.0, 0.9, 0.5, 1.0],
        "min_ps": [0.0, 0.0, 0.0, 0.1, 0.02],
        "seeds": [9, 8, 7, 2**64 - 1, 5],
    }
    together, _ = draw(logits, Draws(**settings_of), [3, 1, 4, 1, 5])
    for row, position in enumerate([3, 1, 4, 1, 5]):
        own = Draws(**{name: values[row : row + 1] for name, values in settings_of.items()})
        alone, _ = draw(logits[row : row + 1], own, [position])
        assert alone.tolist() == together[row : row + 1].tolist()


def test_a_row_without_a_number_shows_in_its_own_logprob_only():
    logits = torch.zeros(2, 4)
    logits[0, 1] = math.nan
    tokens, logprobs = draw(logits, draws(2), [0, 0])
    assert math.isnan(logprobs[0])
    assert logprobs[1] == pytest.approx(math.log(1 / 4))
    assert 0 <= tokens[0] < 4


def test_target_logprobs_and_ranks_equal_a_sort():
    torch.manual_seed(2)
    logits = torch.randn(3, 7, 20)
    targets = torch.randint(20, (3, 7))
    logprobs, ranks = target_logprobs(logits, targets)
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0], atol=1e-6)
    order = logits.argsort(-1, descending=True)
    assert torch.equal(ranks, (order == targets[..., None]).int().argmax(-1))

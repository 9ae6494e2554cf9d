"""Sampling: noise from (seed, position) only, every parameter against a slow definition, log-probabilities."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model.sampling import draw as sampling
from model.sampling.draw import score_targets, uniform_noise
from model.sampling.filters import pick
from model.sampling.params import SamplingParams
from tests.support.slow_sampling import (
    Line,
    NearAnEdgeError,
    draw_lines,
    draw_many,
    lines_of,
    slow_distribution,
    slow_draw,
)


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


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_every_parameter_does_what_a_slow_loop_over_tokens_does(data):
    vocab_size = data.draw(st.integers(2, 30))
    logits = data.draw(st.lists(st.floats(-5, 5, width=32), min_size=vocab_size, max_size=vocab_size))
    line = data.draw(lines_of(vocab_size))
    try:
        expected = slow_draw(logits, line)
    except NearAnEdgeError:
        assume(False)
    drawn = draw_lines(torch.tensor([logits]), [line])
    assert drawn.tokens.tolist() == [expected]
    exact = np.array(logits) - np.logaddexp.reduce(logits)
    assert drawn.logprobs[0].item() == pytest.approx(exact[expected], abs=1e-5)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.8},
        {"typical_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "typical_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_drawn_frequencies_follow_the_documented_filters(parameters):
    parameters = {"temperature": 1.0} | parameters
    logits = np.random.default_rng(3).normal(0, 1.5, 12).astype(np.float32)
    expected = slow_distribution(logits.tolist(), SamplingParams(**parameters))
    rows = 6000
    counts = np.bincount(draw_many(logits, rows, **parameters), minlength=12) / rows
    for token, found in enumerate(counts):
        wanted = expected.get(token, 0.0)
        assert abs(found - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / rows) + 1e-9


def test_a_token_without_weight_is_never_picked_not_even_by_the_lowest_or_highest_number():
    weights = torch.tensor([[0, 3, 0, 5, 0]]).repeat(3, 1)
    assert pick(weights, torch.tensor([0.0, 3 / 8, 1 - 2.0**-48], dtype=torch.float64)).tolist() == [1, 3, 3]


def test_nothing_asked_draws_by_the_cumulative_softmax_at_the_uniform_number():
    torch.manual_seed(0)
    logits = torch.randn(400, 500) * 3
    seeds = np.arange(400, dtype=np.uint64)
    drawn = draw_lines(logits, [Line(SamplingParams(temperature=1.0, seed=int(seed)), position=8) for seed in seeds])
    cumulative = logits.softmax(-1).double().cumsum(-1)
    target = torch.from_numpy(uniform_noise(seeds, np.full(400, 8)))[:, None] * cumulative[:, -1:]
    assert torch.equal(drawn.tokens, torch.searchsorted(cumulative, target, right=True)[:, 0])
    assert drawn.top_ids is None
    assert drawn.top_logprobs is None


@settings(max_examples=40, deadline=None)
@given(
    lines=st.lists(lines_of(301), min_size=2, max_size=9),
    seed=st.integers(0, 100),
    rounded=st.booleans(),  # logits of a bf16 model, where equal logits are common
)
def test_a_line_gets_bit_for_bit_the_same_alone_and_among_any_others(lines, seed, rounded):
    logits = torch.randn(len(lines), 301, generator=torch.Generator().manual_seed(seed)) * 4
    logits = logits.bfloat16().float() if rounded else logits
    together = draw_lines(logits, lines)
    for i, line in enumerate(lines):
        alone = draw_lines(logits[i : i + 1], [line])
        assert torch.equal(alone.tokens, together.tokens[i : i + 1])
        assert torch.equal(alone.logprobs, together.logprobs[i : i + 1])
        num = line.sampling.num_top
        if num:
            assert torch.equal(alone.top_ids[0, :num], together.top_ids[i, :num])
            assert torch.equal(alone.top_logprobs[0, :num], together.top_logprobs[i, :num])


def test_a_line_gets_the_same_alone_with_a_vocabulary_that_threads_would_share_out():
    torch.manual_seed(5)
    logits = torch.randn(3, 70001) * 3
    lines = [
        Line(SamplingParams(temperature=1.0, typical_p=0.95, num_top=3, seed=1)),
        Line(SamplingParams(temperature=0.9, top_p=0.999, seed=2)),
        Line(SamplingParams(num_top=2)),
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = draw_lines(logits, lines)
        entropies = score_targets(logits, together.tokens, entropy=True).entropies
        for i, line in enumerate(lines):
            alone = draw_lines(logits[i : i + 1], [line])
            assert torch.equal(alone.tokens, together.tokens[i : i + 1])
            assert torch.equal(alone.logprobs, together.logprobs[i : i + 1])
            scored = score_targets(logits[i : i + 1], alone.tokens, entropy=True)
            assert torch.equal(scored.logprobs, alone.logprobs)
            assert torch.equal(scored.entropies, entropies[i : i + 1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_lines_that_do_not_fit_into_memory_together_get_the_same_one_after_another(at_once):
    kinds = [{}, {"top_k": 9}, {"top_p": 0.9}, {"typical_p": 0.9}, {"min_p": 0.01}, {"temperature": 0.0}]
    parameters = [{"temperature": 1.0} | kinds[i % len(kinds)] for i in range(17)]  # 15 at random
    lines = [Line(SamplingParams(num_top=i % 3, seed=i, **one), position=7 * i) for i, one in enumerate(parameters)]
    logits = torch.randn(len(lines), 40, generator=torch.Generator().manual_seed(1))
    together = draw_lines(logits, lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "SCRATCH_BYTES", {"cpu": 40 * sampling.BYTES_TO_DRAW * at_once})
        apart = draw_lines(logits, lines)
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one, other)


def test_as_many_lines_are_worked_on_at_once_as_memory_allows():
    cpu = torch.device("cpu")
    assert sampling.lines_at_once(267735, bytes_per_score=24, device=cpu) == 8  # 51 of 64 MiB
    assert sampling.lines_at_once(256, bytes_per_score=24, device=cpu) == 8192
    assert sampling.lines_at_once(10**9, bytes_per_score=24, device=cpu) == 1
    assert sampling.lines_at_once(10**9, bytes_per_score=24, device=cpu, least=4) == 4


def test_a_neighbour_s_top_p_does_not_cut_the_tail_of_a_line_without():
    # Summed in fp32 the shares pass 1 before the tail, whose 268 tokens have 3e-7 of the probability.
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 4
    logits = logits.sort(descending=True).values
    seed = 92574815  # its noise at position 0 is close to 1: 1 - 9e-9
    plain, cut = (
        Line(SamplingParams(temperature=1.0, seed=seed)),
        Line(SamplingParams(temperature=1.0, top_p=0.5, seed=seed)),
    )
    alone = draw_lines(logits[None], [plain]).tokens
    assert alone[0] > 732
    assert draw_lines(logits.repeat(2, 1), [plain, cut]).tokens[0] == alone[0]


def test_temperature_zero_takes_the_best_token_beside_random_lines():
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    lines = [Line(SamplingParams(temperature=t, seed=i)) for i, t in enumerate([0.0, 1.0, 0.0, 1.0, 0.0, 0.5])]
    drawn = draw_lines(logits, lines)
    assert drawn.tokens[[0, 2, 4]].tolist() == logits[[0, 2, 4]].argmax(-1).tolist()
    assert torch.allclose(drawn.logprobs, logits.log_softmax(-1).gather(-1, drawn.tokens[:, None])[:, 0], atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-45])
def test_the_coldest_temperatures_take_the_best_token(temperature):
    logits = torch.tensor([-80.0, 3.0, 90.0, 89.0])
    assert set(draw_many(logits, 50, temperature=temperature).tolist()) == {2}


def test_of_equals_the_first_is_the_best():
    logits = torch.tensor([[-0.0, 2.0, 2.0, -1.0, 2.0, 0.0]])
    drawn = draw_lines(logits, [Line(SamplingParams(num_top=6))])
    assert drawn.tokens.tolist() == [1]
    assert drawn.top_ids.tolist() == [[1, 2, 4, 0, 5, 3]]


@pytest.mark.parametrize("parameters", [{"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}], ids=str)
def test_tokens_as_probable_as_the_last_that_stays_stay_too(parameters):
    drawn = draw_many([1.0, 3.0, 3.0, 0.0], 200, temperature=1.0, **parameters)
    assert set(drawn.tolist()) == {1, 2}


def test_typical_p_leaves_out_the_most_probable_token_where_it_is_not_typical():
    probabilities = np.array([0.4, *[0.6 / 60] * 60])
    drawn = draw_many(np.log(probabilities).astype(np.float32), 300, temperature=1.0, typical_p=0.3)
    assert 0 not in drawn
    assert 0 in draw_many(np.log(probabilities).astype(np.float32), 300, temperature=1.0, typical_p=0.7)


def test_the_top_is_that_of_the_model_whatever_is_drawn():
    torch.manual_seed(3)
    logits = torch.randn(3, 40)
    lines = [
        Line(SamplingParams(temperature=2.0, top_k=3, num_top=5, logit_bias=((7, 50.0),))),
        Line(SamplingParams()),
        Line(SamplingParams(num_top=2, repetition_penalty=9.0), prompt=tuple(range(20))),
    ]
    drawn = draw_lines(logits, lines)
    values, ids = logits.log_softmax(-1).topk(5)
    assert torch.equal(drawn.top_ids, ids)
    assert torch.equal(drawn.top_logprobs, values)
    assert drawn.tokens[0] == 7


def test_a_top_longer_than_the_vocabulary_is_the_vocabulary():
    drawn = draw_lines(torch.tensor([[0.0, 1.0]]), [Line(SamplingParams(num_top=5))])
    assert drawn.top_ids.tolist() == [[1, 0]]


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_a_line_without_numbers_shows_in_its_own_logprob_only(value):
    torch.manual_seed(4)
    features = {"top_k": 9, "top_p": 0.9, "typical_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "num_top": 2}
    lines = [
        Line(SamplingParams(temperature=temperature, seed=seed, **chosen))
        for seed, (temperature, chosen) in enumerate(itertools.product([0.0, 1.0], [{}, features]))
    ]
    clean = torch.randn(4, 30)
    expected = draw_lines(clean, lines)
    for broken in range(4):
        logits = clean.clone()
        logits[broken, 11] = value
        drawn = draw_lines(logits, lines)
        others = [i for i in range(4) if i != broken]
        assert not torch.isfinite(drawn.logprobs[broken])
        assert 0 <= drawn.tokens[broken] < 30
        assert torch.equal(drawn.tokens[others], expected.tokens[others])
        assert torch.equal(drawn.logprobs[others], expected.logprobs[others])
        assert torch.equal(drawn.top_logprobs[others], expected.top_logprobs[others])


def test_drawing_leaves_the_logits_as_they_were():
    logits = torch.randn(1, 9)
    before = logits.clone()
    line = Line(
        SamplingParams(
            temperature=0.7, top_k=2, presence_penalty=1.0, logit_bias=((1, 2.0),), end_ids=(2,), min_new_tokens=1
        )
    )
    draw_lines(logits, [line])
    assert torch.equal(logits, before)


def test_logprobs_and_ranks_of_targets_equal_a_sort():
    torch.manual_seed(2)
    logits = torch.randn(3, 7, 20)
    targets = torch.randint(20, (3, 7))
    logprobs, ranks = score_targets(logits, targets)[:2]
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0], atol=1e-6)
    order = logits.argsort(-1, descending=True)
    assert torch.equal(ranks, (order == targets[..., None]).int().argmax(-1))


def test_scoring_extras_are_the_best_tokens_and_the_entropy():
    torch.manual_seed(6)
    logits = torch.randn(50, 33) * 4
    targets = torch.randint(33, (50,))
    scored = score_targets(logits, targets, num_top=3, entropy=True)
    exact = logits.double().log_softmax(-1)
    assert torch.equal(scored.top_ids, exact.topk(3).indices)
    torch.testing.assert_close(scored.top_logprobs, exact.topk(3).values.float())
    torch.testing.assert_close(scored.entropies, -(exact.exp() * exact).sum(-1).float(), atol=1e-5, rtol=1e-5)
    plain = score_targets(logits, targets)
    assert torch.equal(plain.logprobs, scored.logprobs)
    assert plain.top_ids is plain.top_logprobs is plain.entropies is None


def test_the_entropy_of_certainty_is_zero_and_that_of_no_numbers_is_none():
    logits = torch.tensor([[0.0, -math.inf, -math.inf], [math.nan, 0.0, 0.0], [1.0, 1.0, 1.0]])
    entropies = score_targets(logits, torch.tensor([0, 0, 0]), entropy=True).entropies
    assert entropies[0] == 0
    assert math.isnan(entropies[1])
    assert entropies[2] == pytest.approx(math.log(3))

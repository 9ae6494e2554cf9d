"""Penalties, biases and bans of end tokens, and the history that penalties are computed from."""

import math

import pytest
import torch

from model.sampling.draw import Draws, draw
from model.sampling.params import SamplingParams
from model.sampling.penalties import History
from tests.support.slow_sampling import Line, draw_lines


def test_greedy_lines_honour_penalties_biases_and_the_minimum_length():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(6, 1)
    lines = [
        Line(SamplingParams()),
        Line(SamplingParams(repetition_penalty=2.0), prompt=(0,)),
        Line(SamplingParams(frequency_penalty=0.6), output=(0, 0)),
        Line(SamplingParams(presence_penalty=1.5), prompt=(0,), output=(0, 1)),
        Line(SamplingParams(logit_bias=((3, 3.5),))),
        Line(SamplingParams(end_ids=(0, 1), min_new_tokens=2), num_generated=1),
    ]
    assert draw_lines(logits, lines).tokens.tolist() == [0, 1, 1, 0, 3, 2]


def test_frequency_and_presence_penalties_pass_over_the_prompt():
    logits = torch.tensor([[4.0, 3.0]])
    penalties = SamplingParams(frequency_penalty=2.0, presence_penalty=2.0)
    assert draw_lines(logits, [Line(penalties, prompt=(0, 0, 0))]).tokens.tolist() == [0]
    assert draw_lines(logits, [Line(penalties, output=(0,))]).tokens.tolist() == [1]


def test_a_token_that_is_named_twice_gets_both_biases():
    sampling = SamplingParams(logit_bias=((1, 0.7), (1, 0.7)))
    assert draw_lines(torch.tensor([[1.0, 0.0]]), [Line(sampling)]).tokens.tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_come_as_soon_as_the_minimum_length_is_reached_and_not_before(temperature):
    logits = torch.zeros(4, 3)
    logits[:, 1] = 30
    sampling = SamplingParams(temperature=temperature, end_ids=(1, 2), min_new_tokens=2)
    drawn = draw_lines(logits, [Line(sampling, num_generated=n) for n in range(4)])
    assert drawn.tokens.tolist() == [0, 0, 1, 1]
    assert torch.equal(drawn.logprobs, logits.log_softmax(-1)[range(4), drawn.tokens])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "ban",
    [{"end_ids": (0, 1, 2), "min_new_tokens": 9}, {"logit_bias": tuple((token, -math.inf) for token in range(3))}],
    ids=str,
)
def test_a_line_whose_every_token_is_banned_is_drawn_as_if_none_were(temperature, ban):
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    banned = draw_lines(logits, [Line(SamplingParams(temperature=temperature, seed=3, **ban))])
    free = draw_lines(logits, [Line(SamplingParams(temperature=temperature, seed=3))])
    assert torch.equal(banned.tokens, free.tokens)
    assert torch.isfinite(banned.logprobs).all()


def test_only_lines_that_are_penalised_need_a_history():
    assert not Draws(
        [SamplingParams(), SamplingParams(logit_bias=((1, 1.0),), end_ids=(1,), min_new_tokens=3)]
    ).penalised
    for penalty in ({"repetition_penalty": 1.1}, {"frequency_penalty": 0.1}, {"presence_penalty": -0.1}):
        draws = Draws([SamplingParams(), SamplingParams(**penalty)])
        assert draws.penalised
        with pytest.raises(AssertionError, match="history"):
            draw(torch.zeros(2, 3), draws, positions=[0, 0], num_generated=[0, 0])


def test_lines_may_share_a_row_of_the_history():
    history = History(3, 4)
    history.read(2, torch.tensor([0]))
    draws = Draws([SamplingParams(repetition_penalty=4.0)] * 2)
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(2, 1)
    drawn = draw(logits, draws, positions=[1, 1], num_generated=[0, 0], history=history, rows=[2, 2])
    assert drawn.tokens.tolist() == [1, 1]


def test_a_history_counts_moves_restores_and_undoes():
    history = History(3, 5)
    assert history.bytes_per_row == 5 * 5
    history.read(0, torch.tensor([1, 3, 3]))
    history.feed(torch.tensor([0, 0, 1, 0]), torch.tensor([2, 2, 2, 4]))
    assert history.seen.int().tolist() == [[0, 1, 0, 1, 0], [0] * 5, [0] * 5]
    assert history.counts.tolist() == [[0, 0, 2, 0, 1], [0, 0, 1, 0, 0], [0] * 5]
    kept = history.snapshot(0)
    history.move(0, 2)
    history.unfeed(torch.tensor([0, 0]), torch.tensor([2, 2]))
    assert history.counts[0].tolist() == [0, 0, 0, 0, 1]
    history.reset(0)
    assert not history.seen[0].any()
    assert not history.counts[0].any()
    history.restore(1, kept)
    assert torch.equal(history.counts[1], history.counts[2])
    assert torch.equal(history.seen[1], history.seen[2])
    assert history.counts[1].tolist() == [0, 0, 2, 0, 1]

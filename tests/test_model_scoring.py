"""Figures are sums over sums, in every unit, and say None where nothing was scored."""

import math

import pytest

from model.scoring import Score


class Words:
    """Token 0 is the two bytes of é, token 1 a space, token 2 the word 'cat'."""

    def token_bytes(self, token):
        return ["é".encode(), b" ", b"cat"][token]


def test_units_are_counted_over_the_scored_tokens():
    score = Score.of(Words(), [0, 1, 2], [-1.0, -2.0, -3.0])
    assert score == Score(logprob=-6.0, num_tokens=3, num_bytes=6, num_chars=5, num_words=2)
    assert score.bits_per_token == pytest.approx(2 / math.log(2))
    assert score.bits_per_byte == pytest.approx(1 / math.log(2))
    assert score.bits_per_char == pytest.approx(6 / 5 / math.log(2))
    assert score.perplexity == pytest.approx(math.exp(2))
    assert score.word_perplexity == pytest.approx(math.exp(3))


def test_nothing_scored_has_no_figures():
    score = Score.of(Words(), [], [])
    assert (score.perplexity, score.word_perplexity) == (None, None)
    assert (score.bits_per_token, score.bits_per_byte, score.bits_per_char) == (None, None, None)


def test_a_perplexity_beyond_a_double_is_infinite():
    assert Score(-1000.0, 1, 1, 1, 1).perplexity == math.inf

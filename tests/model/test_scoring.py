"""Scores are sums divided by sums, in every unit, and None if nothing was scored."""

import math
import random

import pytest

from model.scoring import RunningFigures, TextFigures


class Words:
    """Token 0 is the two bytes of é, token 1 a space, token 2 the word 'cat'."""

    def token_bytes(self, token):
        return ["é".encode(), b" ", b"cat"][token]


def test_units_are_counted_over_the_scored_tokens():
    score = TextFigures.of(Words(), [0, 1, 2], [-1.0, -2.0, -3.0])
    assert score == TextFigures(logprob=-6.0, num_tokens=3, num_bytes=6, num_chars=5, num_words=2)
    assert score.bits_per_token == pytest.approx(2 / math.log(2))
    assert score.bits_per_byte == pytest.approx(1 / math.log(2))
    assert score.bits_per_char == pytest.approx(6 / 5 / math.log(2))
    assert score.perplexity == pytest.approx(math.exp(2))
    assert score.word_perplexity == pytest.approx(math.exp(3))


def test_nothing_scored_has_no_figures():
    score = TextFigures.of(Words(), [], [])
    assert (score.perplexity, score.word_perplexity) == (None, None)
    assert (score.bits_per_token, score.bits_per_byte, score.bits_per_char) == (None, None, None)


def test_a_perplexity_beyond_a_double_is_infinite():
    assert TextFigures(-1000.0, 1, 1, 1, 1).perplexity == math.inf


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def token_bytes(self, token):
        return bytes([token])


def tally_of(tokens, logprobs, *, cuts):
    tally = RunningFigures(Bytes())
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        tally.add(tokens[start:end], logprobs[start:end])
    return tally.score


def test_a_text_in_stretches_scores_as_in_one_piece_wherever_it_is_cut():
    text = " Zwölf  Boxkämpfer\njagen Viktor. ".encode()
    tokens, logprobs = list(text), [-1.0 / (place + 1) for place in range(len(text))]
    whole = TextFigures.of(Bytes(), tokens, logprobs)
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):  # some parts are empty
            assert tally_of(tokens, logprobs, cuts=[first, second]) == whole
    assert tally_of(tokens, logprobs, cuts=list(range(1, len(text)))) == whole


def test_the_sum_of_many_stretches_is_rounded_only_once():
    source = random.Random(3)
    logprobs = [-(10.0 ** source.uniform(-12, 2)) for _ in range(20_000)]
    whole = TextFigures.of(Bytes(), [0] * len(logprobs), logprobs)
    assert sum(logprobs) != whole.logprob, "too easy: adding up carelessly does as well"
    assert tally_of([0] * len(logprobs), logprobs, cuts=list(range(7, len(logprobs), 7))) == whole


def test_a_token_that_the_model_excludes_makes_the_whole_text_impossible():
    tally = RunningFigures(Bytes())
    for logprob in (-1.0, -math.inf, -1.0):
        tally.add([65], [logprob])
    assert tally.score.logprob == -math.inf
    assert tally.score.perplexity == math.inf


def test_a_tally_of_nothing_has_no_figures():
    assert RunningFigures(Bytes()).score == TextFigures.of(Bytes(), [], [])

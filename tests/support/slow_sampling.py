"""The reference for draws, written from the documentation: plain loops over one row of logits in float64.

It imports only the noise from model/. `draw_lines` gives the same cases, as a batch, to the code under test.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from model.sampling.draw import Draws, draw, uniform_noise
from model.sampling.params import SamplingParams
from model.sampling.penalties import History

CLOSE = 1e-5  # relative distance from a threshold within which fp32 and float64 may decide differently


@dataclass(frozen=True)
class Line:
    """One line of a batch: its sampling parameters, position, and tokens so far."""

    sampling: SamplingParams
    position: int = 0
    num_generated: int = 0
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()


def history_of(lines, vocab_size):
    history = History(len(lines), vocab_size)
    for row, line in enumerate(lines):
        history.read(row, torch.tensor(line.prompt, dtype=torch.int64))
        history.feed(torch.full((len(line.output),), row), torch.tensor(line.output, dtype=torch.int64))
    return history


def draw_lines(logits, lines):
    return draw(
        logits,
        Draws([line.sampling for line in lines]),
        positions=[line.position for line in lines],
        num_generated=[line.num_generated for line in lines],
        history=history_of(lines, logits.shape[-1]),
        rows=range(len(lines)),
    )


def draw_many(logits, count, **parameters):
    """Return the tokens of `count` lines with the same logits and seeds 0, 1, ..."""
    lines = [Line(SamplingParams(seed=seed, **parameters), position=5) for seed in range(count)]
    return draw_lines(torch.as_tensor(logits)[None].repeat(count, 1), lines).tokens.numpy()


class NearAnEdgeError(Exception):
    """The logits are too near a threshold: fp32 may decide either way."""


def clear(left, right):
    """Return left >= right; raise NearAnEdgeError if they are nearly equal but not equal."""
    if left != right and abs(left - right) < CLOSE * max(1.0, abs(right)):
        raise NearAnEdgeError
    return left >= right


def slow_scores(logits, line):
    """Return the logits after penalties, bias and min_new_tokens, one token at a time."""
    sampling, scores = line.sampling, [float(x) for x in logits]
    for token in set(line.prompt + line.output):
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(line.output):
        scores[token] -= sampling.frequency_penalty * line.output.count(token) + sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    if line.num_generated < sampling.min_new_tokens:
        for token in sampling.end_ids:
            scores[token] = -math.inf
    return scores if max(scores) > -math.inf else [float(x) for x in logits]


def prefix(order, weights, share):
    """Return the first tokens of an order whose weights add up to a share of all weights."""
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += weights[token]
        if clear(mass / sum(weights.values()), share):
            break
    return kept


def slow_distribution(scores, sampling):
    """Return the tokens that the filters keep and their probabilities, {token: p}, as the documentation says."""
    highest = max(scores)
    left = {i: math.exp((x - highest) / sampling.temperature) for i, x in enumerate(scores) if x > -math.inf}
    total = sum(left.values())
    left = {i: w / total for i, w in left.items()}
    if sampling.top_k:
        edge = sorted(left.values(), reverse=True)[: sampling.top_k][-1]
        left = {i: w for i, w in left.items() if clear(w / edge, 1.0)}
    if sampling.top_p < 1:
        kept = prefix(sorted(left, key=lambda i: -left[i]), left, sampling.top_p)
        left = {i: w for i, w in left.items() if clear(w / left[kept[-1]], 1.0)}
    if sampling.typical_p < 1:
        total = sum(left.values())
        entropy = -sum(w / total * math.log(w / total) for w in left.values() if w)
        distance = {i: abs(-math.log(w / total) - entropy) if w else math.inf for i, w in left.items()}
        kept = prefix(sorted(left, key=lambda i: distance[i]), left, sampling.typical_p)
        left = {i: w for i, w in left.items() if clear(distance[kept[-1]], distance[i])}
    if sampling.min_p:
        highest = max(left.values())
        left = {i: w for i, w in left.items() if clear(w / highest, sampling.min_p)}
    total = sum(left.values())
    return {i: w / total for i, w in left.items()}


def slow_draw(logits, line):
    """Return the token at which the sum of probabilities exceeds the uniform number; if greedy, the best token."""
    scores, sampling = slow_scores(logits, line), line.sampling
    if sampling.temperature == 0:
        ordered = sorted(scores)
        if len(scores) > 1 and ordered[-1] - ordered[-2] < CLOSE:
            raise NearAnEdgeError
        return max(range(len(scores)), key=lambda token: scores[token])
    uniform = uniform_noise(np.array([sampling.seed], np.uint64), np.array([line.position]))[0]
    mass, distribution = 0.0, slow_distribution(scores, sampling)
    for token, probability in sorted(distribution.items()):
        mass += probability
        if mass > uniform:
            if min(mass - uniform, uniform - (mass - probability)) < CLOSE:
                raise NearAnEdgeError
            return token
    raise NearAnEdgeError


def samplings(vocab_size):
    token = st.integers(0, vocab_size - 1)
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.0, 2.0]),
        top_k=st.sampled_from([0, 0, 1, 2, 5, 40]),
        top_p=st.sampled_from([1.0, 1.0, 0.95, 0.6, 0.2, 0.01]),
        min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
        typical_p=st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.8, -0.5]),
        presence_penalty=st.sampled_from([0.0, 0.0, 1.1, -0.9]),
        logit_bias=st.sampled_from([(), ()])
        | st.dictionaries(token, st.sampled_from([-100.0, -1.5, 2.0]), max_size=3).map(lambda d: tuple(d.items())),
        end_ids=st.lists(token, max_size=2).map(tuple),
        min_new_tokens=st.integers(0, 3),
        num_top=st.integers(0, 4),
        seed=st.integers(0, 2**64 - 1),
    )


def lines_of(vocab_size):
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=6).map(tuple)
    return st.builds(
        Line,
        sampling=samplings(vocab_size),
        position=st.integers(0, 10**6),
        num_generated=st.integers(0, 4),
        prompt=tokens,
        output=tokens,
    )

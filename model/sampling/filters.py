"""The filters that decide which tokens may be drawn (top_k, top_p, typical_p, min_p), and the draw itself.

Filters work on weights, which are probabilities in fixed point. A sum of integers is the same in any order, so neither
the batch nor the device's order of summation can move the threshold of a filter or the drawn token, and a long tail of
small probabilities loses nothing to rounding. A filter reads the weights that the filters before it left and returns
the tokens to keep; it also keeps every token whose weight equals the smallest weight that it keeps.

Sizes: b lines that use a filter, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

ONE = 2.0**60  # the weight of probability 1: sums stay below 2^63, and every fp32 number above 2^-36 is exact
FINE = 2.0**48  # the fixed-point value of 1 in `exact_sum`: sums stay below 2^15


Keep = Callable[[Tensor, Tensor], Tensor]  # weights [b, V], parameter [b, 1] -> whether to keep each token [b, V]


class FilterKind(NamedTuple):
    """A kind of filter, and the name of the parameter in `SamplingParams` that switches it on."""

    parameter: str
    keep: Callable[[Sequence[float]], Keep]  # makes the filter from the parameter's value in each line that uses it
    dtype: torch.dtype  # of the parameter


class Filter(NamedTuple):
    """A filter and the lines of the batch that use it."""

    keep: Keep
    lines: Tensor  # [b] int64
    parameter: Tensor  # [b, 1]

    def apply(self, weights: Tensor) -> None:
        """Set the weights of the tokens that the filter does not keep to zero, in place. weights: [B, V]."""
        line_weights = weights[self.lines]
        weights[self.lines] = line_weights * self.keep(line_weights, self.parameter)


def to_weights(probabilities: Tensor) -> Tensor:
    """Convert probabilities (fp32) to weights (int64)."""
    return (probabilities * ONE).long()


def keep_top_k(weights: Tensor, top_k: Tensor, *, largest: int) -> Tensor:
    """Keep the `top_k` tokens of the largest weights; `largest` is the largest `top_k` of the batch."""
    vocab_size = weights.shape[-1]
    ordered = weights.topk(min(largest, vocab_size)).values
    return weights >= ordered.gather(-1, top_k.clamp(max=vocab_size) - 1)


def keep_top_p(weights: Tensor, top_p: Tensor) -> Tensor:
    """Keep the fewest most probable tokens with at least `top_p` of the total weight.

    Holtzman et al. 2019, arXiv 1904.09751.
    """
    ordered = weights.sort(-1, descending=True).values
    return weights >= ordered.gather(-1, _last_needed(ordered, top_p))


def keep_typical(weights: Tensor, typical_p: Tensor) -> Tensor:
    """Keep the fewest tokens, those of surprise nearest to the entropy first, with at least `typical_p` of the total.

    Meister et al. 2022, arXiv 2202.00666. Surprise and entropy are of the weights, renormalised.
    """
    share = weights.double() / weights.sum(-1, keepdim=True).double()
    surprise = -share.log()  # infinite where the weight is zero
    entropy = exact_sum(torch.where(weights > 0, share * surprise, 0.0))
    distance = (surprise - entropy[:, None]).abs()
    ordered, order = distance.sort(-1)
    return distance <= ordered.gather(-1, _last_needed(weights.gather(-1, order), typical_p))


def keep_min_p(weights: Tensor, min_p: Tensor) -> Tensor:
    """Keep the tokens whose weight is at least `min_p` times the largest weight."""
    return weights.double() >= min_p * weights.amax(-1, keepdim=True).double()


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """For each line the first token whose cumulative weight exceeds `uniform` [b] (in [0, 1)) times the total, [b]."""
    cumulative = weights.cumsum(-1)
    target = (uniform[:, None] * cumulative[:, -1:].double()).long()
    # The clamp is for lines that hold NaN: their draw has no meaning, but it must be a token.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=weights.shape[-1] - 1)


def exact_sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension, the same bits in any order of summation: [..., V] -> [...] float64."""
    return (terms * FINE).long().sum(-1).double() / FINE


def _last_needed(ordered: Tensor, share: Tensor) -> Tensor:
    """Index of the last weight, in the given order, that is needed to reach `share` of the total, [b, 1]."""
    cumulative = ordered.cumsum(-1)
    before = (cumulative - ordered).double()
    needed = (before < share * cumulative[:, -1:].double()).sum(-1, keepdim=True)
    return (needed - 1).clamp(min=0)


FILTERS = (  # in the order of their application
    FilterKind("top_k", lambda values: partial(keep_top_k, largest=int(max(values))), torch.int64),
    FilterKind("top_p", lambda _: keep_top_p, torch.float64),
    FilterKind("typical_p", lambda _: keep_typical, torch.float64),
    FilterKind("min_p", lambda _: keep_min_p, torch.float64),
)

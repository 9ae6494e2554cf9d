"""Which tokens may be drawn at all, by their weights: top_k, top_p, typical_p, min_p, and the draw itself.

Weights are probabilities in fixed point. Integers add up to the same in any order, so that neither the batch nor the
device's way of summing can move the edge of a filter or a drawn token, and nothing is lost by rounding in a long tail.
A filter takes the weights that the ones before it left and says which tokens stay; tokens as heavy as the last one that
stays, stay too.

Sizes: b lines that use a filter, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

ONE = 2.0**60  # the weight of probability 1: sums stay below 2^63, and every fp32 number above 2^-36 is exact
FINE = 2.0**48  # a nat in `exact_sum`: room for 2^15 of them


Keep = Callable[[Tensor, Tensor], Tensor]  # weights [b, V], parameter [b, 1] -> which tokens stay [b, V]


class FilterKind(NamedTuple):
    """A filter, and the parameter of `SamplingParams` that asks for it."""

    parameter: str
    keep: Callable[[Sequence[float]], Keep]  # from the values of the lines that use the filter
    dtype: torch.dtype  # of the parameter


class Filter(NamedTuple):
    """One kind of filter on the lines that use it."""

    keep: Keep
    lines: Tensor  # [b] int64
    parameter: Tensor  # [b, 1]

    def apply(self, weights: Tensor) -> None:
        """Set the weights of those who do not stay to zero, in place."""
        own = weights[self.lines]
        weights[self.lines] = own * self.keep(own, self.parameter)


def to_weights(probabilities: Tensor) -> Tensor:
    """Probabilities fp32 -> weights int64."""
    return (probabilities * ONE).long()


def keep_top_k(weights: Tensor, top_k: Tensor, *, largest: int) -> Tensor:
    """The `top_k` heaviest; `largest` is the largest top_k."""
    vocab_size = weights.shape[-1]
    ordered = weights.topk(min(largest, vocab_size)).values
    return weights >= ordered.gather(-1, top_k.clamp(max=vocab_size) - 1)


def keep_top_p(weights: Tensor, top_p: Tensor) -> Tensor:
    """The fewest heaviest ones that have the share `top_p` of all (Holtzman et al. 2019, arXiv 1904.09751)."""
    ordered = weights.sort(-1, descending=True).values
    return weights >= ordered.gather(-1, _last_needed(ordered, top_p))


def keep_typical(weights: Tensor, typical_p: Tensor) -> Tensor:
    """The fewest ones, of those whose surprise is nearest to the entropy, that have the share `typical_p` of all.

    Meister et al. 2022, arXiv 2202.00666. The distribution is what is left, renormalised.
    """
    share = weights.double() / weights.sum(-1, keepdim=True).double()
    surprise = -share.log()  # infinite where nothing is left
    entropy = exact_sum(torch.where(weights > 0, share * surprise, 0.0))
    distance = (surprise - entropy[:, None]).abs()
    ordered, order = distance.sort(-1)
    return distance <= ordered.gather(-1, _last_needed(weights.gather(-1, order), typical_p))


def keep_min_p(weights: Tensor, min_p: Tensor) -> Tensor:
    """Those at least `min_p` times as heavy as the heaviest that is left."""
    return weights.double() >= min_p * weights.amax(-1, keepdim=True).double()


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the sum of weights exceeds a share `uniform` [b] in [0, 1) of the total, [b]."""
    cumulative = weights.cumsum(-1)
    target = (uniform[:, None] * cumulative[:, -1:].double()).long()
    # The clamp is for lines that hold NaN: what they draw means nothing, but it must be a token.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=weights.shape[-1] - 1)


def exact_sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension, the same bit for bit in any order, [..., V] -> [...] float64."""
    return (terms * FINE).long().sum(-1).double() / FINE


def _last_needed(ordered: Tensor, share: Tensor) -> Tensor:
    """Place of the last weight, in the order given, that is needed to reach a share of the total, [b, 1]."""
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

"""Drawn tokens and log-probabilities from logits. The noise of a draw depends only on (seed, position).

Host work (`Draws`) and device work (`draw`) are separate; no Python loop runs over lines, and nothing waits for the
device. A line is the logits of one sequence in a batch. The results of a line depend, bit for bit, on that line only:
log_softmax sums each line in the same order, whereas logsumexp changes its order with the size of the batch.

Sizes: B lines of a batch, b lines that are drawn at random, V vocabulary, n best tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.sampling.filters import FILTERS, Filter, exact_sum, pick, to_weights
from model.sampling.params import SamplingParams
from model.sampling.penalties import History, Penalties

COLDEST = 1e-20  # lowest temperature above 0: a lower temperature would change no draw, but overflow
# Logits of one line over 267,735 words are 1 MB, and some steps need many copies: they work on as many lines as fit.
SCRATCH_BYTES = {"cpu": 2**26, "cuda": 2**30}
BYTES_TO_SCORE = 24  # a logit: logits, log-probabilities and the temporaries of `_best` or `_entropy`
BYTES_TO_DRAW = 96  # a logit: fixed-point weights, their sorted copies, and the doubles of typical_p


class DrawnTokens(NamedTuple):
    """Drawn tokens. Log-probabilities are log softmax(logits): temperature 1, no filter, no penalty."""

    tokens: Tensor  # [B] int64
    logprobs: Tensor  # [B] fp32; not finite where a line's logits are not
    top_ids: Tensor | None  # [B, n] int64, the best first; n is the largest `num_top`; None if n is 0
    top_logprobs: Tensor | None  # [B, n] fp32


class TokenScores(NamedTuple):
    """Log-probabilities and ranks of given tokens; the other fields are None unless requested."""

    logprobs: Tensor  # [...] fp32, nats
    ranks: Tensor  # [...] int64, 0 = the most probable
    top_ids: Tensor | None  # [..., n] int64, the best first
    top_logprobs: Tensor | None  # [..., n] fp32
    entropies: Tensor | None  # [...] fp32, nats


class RandomLines:
    """Lines of a batch that are drawn at random together, and their sampling parameters as tensors."""

    def __init__(self, samplings: Sequence[SamplingParams], lines: Sequence[int], device: torch.device | str) -> None:
        params = [samplings[line] for line in lines]
        self.places = list(lines)
        self.lines = torch.tensor(self.places, dtype=torch.int64, device=device)  # [b]
        self.seeds = np.array([param.seed for param in params], dtype=np.uint64)  # [b]
        self.temperature = _column(
            [max(param.temperature, COLDEST) for param in params], torch.float32, device
        )  # [b, 1]
        self.filters = _filters(params, device)

    def draw(self, scores: Tensor, positions: Sequence[int]) -> Tensor:
        """Tokens [b] from the scores [B, V] and positions [B] of the whole batch."""
        probabilities = torch.softmax(scores[self.lines] / self.temperature, -1)  # [b, V]
        weights = to_weights(probabilities)
        for token_filter in self.filters:
            token_filter.apply(weights)
        uniform = uniform_noise(self.seeds, np.asarray(positions)[self.places])
        return pick(weights, torch.from_numpy(uniform).to(scores.device))


class Draws:
    """The sampling parameters of a batch, prepared once per batch composition and used for many steps."""

    def __init__(self, samplings: Sequence[SamplingParams], *, device: torch.device | str = "cpu") -> None:
        self.penalties = Penalties(samplings, device=device)
        self.num_top = max((params.num_top for params in samplings), default=0)
        self._samplings, self._device = list(samplings), device
        self._random = [
            line for line, params in enumerate(samplings) if params.temperature > 0
        ]  # the other lines are greedy
        self._groups: dict[int, list[RandomLines]] = {}

    def groups(self, size: int) -> list[RandomLines]:
        """The lines that are drawn at random, in groups of `size`."""
        if size not in self._groups:
            starts = range(0, len(self._random), size)
            groups = [self._random[start : start + size] for start in starts]
            self._groups[size] = [RandomLines(self._samplings, lines, self._device) for lines in groups]
        return self._groups[size]

    @property
    def penalised(self) -> bool:
        """Whether some line needs the history of its row."""
        return self.penalties.penalised


def draw(
    logits: Tensor,
    draws: Draws,
    *,
    positions: Sequence[int],
    num_generated: Sequence[int],
    history: History | None = None,
    rows: Sequence[int] = (),
) -> DrawnTokens:
    """Draw one token a line: the most probable token if greedy, else by inverting the cumulative distribution.

    The order is: repetition, frequency and presence penalties, bias, bans of end tokens; then for greedy lines the
    largest score (of equal scores the first), for other lines temperature, top_k, top_p, typical_p and min_p, each
    applied to the tokens that the filters before it kept.

    Args:
        logits: [B, V] fp32.
        positions: for each line, the number of tokens before the drawn token.
        num_generated: for each line, how many of these tokens were generated.
        history, rows: the tokens that occurred, and the row of each line in `history`; required if a line is penalised.
    """
    scores = draws.penalties.apply(logits, num_generated=num_generated, history=history, rows=rows)
    tokens = scores.argmax(-1)
    size = lines_at_once(logits.shape[-1], bytes_per_score=BYTES_TO_DRAW, device=logits.device)
    for group in draws.groups(size):
        tokens[group.lines] = group.draw(scores, positions)
    logprobs = logits.log_softmax(-1)
    top_ids = _best(logits, draws.num_top) if draws.num_top else None
    top_logprobs = logprobs.gather(-1, top_ids) if top_ids is not None else None
    return DrawnTokens(tokens, logprobs.gather(-1, tokens[:, None])[:, 0], top_ids, top_logprobs)


def score_targets(logits: Tensor, targets: Tensor, *, num_top: int = 0, entropy: bool = False) -> TokenScores:
    """Log-probabilities and ranks of given tokens; on request also the best tokens and the entropy.

    Args:
        logits: [..., V] fp32.
        targets: [...] int64.
    """
    logprobs = logits.log_softmax(-1)  # [..., V]
    target_logprobs = logprobs.gather(-1, targets[..., None])[..., 0]
    ranks = (logits > logits.gather(-1, targets[..., None])).sum(-1)
    top_ids = _best(logits, num_top) if num_top else None
    top_logprobs = logprobs.gather(-1, top_ids) if top_ids is not None else None
    return TokenScores(target_logprobs, ranks, top_ids, top_logprobs, _entropy(logprobs) if entropy else None)


def join_scored(parts: Sequence[TokenScores]) -> TokenScores:
    """Concatenate the scores of consecutive parts of a text."""
    if len(parts) == 1:
        return parts[0]
    logprobs, ranks, top_ids, top_logprobs, entropies = zip(*parts, strict=True)
    return TokenScores(torch.cat(logprobs), torch.cat(ranks), *map(_joined, (top_ids, top_logprobs, entropies)))


def lines_at_once(vocab_size: int, *, bytes_per_score: int, device: torch.device, least: int = 1) -> int:
    """How many lines to work on at a time: the largest power of two that SCRATCH_BYTES allows, at least `least`."""
    fitting = SCRATCH_BYTES[device.type] // (bytes_per_score * vocab_size)
    return max(least, 1 << max(0, fitting.bit_length() - 1))


def uniform_noise(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) from (seed, position): SplitMix64 (Steele et al. 2014) applied to both in turn.

    Args:
        seeds: [B] uint64.
        positions: [B] integers.

    Returns:
        [B] float64 with 48 random bits.
    """
    mixed = _splitmix(_splitmix(seeds.astype(np.uint64)) ^ positions.astype(np.uint64))
    return (mixed >> np.uint64(16)).astype(np.float64) * 2.0**-48


def _splitmix(state: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = state ^ (state >> np.uint64(31))
    return mixed


def _filters(samplings: Sequence[SamplingParams], device: torch.device | str) -> list[Filter]:
    """The filters that at least one line uses, in the order of application."""
    filters = []
    for kind in FILTERS:
        off = getattr(SamplingParams, kind.parameter)
        in_line = [getattr(params, kind.parameter) for params in samplings]
        used = {line: value for line, value in enumerate(in_line) if value != off}
        if used:
            values = list(used.values())
            lines, column = torch.tensor(list(used), device=device), _column(values, kind.dtype, device)
            filters.append(Filter(kind.keep(values), lines, column))
    return filters


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The parts concatenated; None if the parts are None."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None]


def _best(logits: Tensor, num: int) -> Tensor:
    """The tokens of the largest logits, the best first, equal logits by ascending token, [..., min(num, V)] int64.

    topk does not define its order among equal values, and equal logits are common with bf16 weights. Therefore the
    logit and the token are packed into one integer; the bits of floats, read as integers, are in the order of the
    floats once the bits of negative floats are flipped.
    """
    vocab_size = logits.shape[-1]
    size = lines_at_once(vocab_size, bytes_per_score=BYTES_TO_SCORE, device=logits.device)
    best = [_best_of_lines(lines, num) for lines in torch.split(logits.reshape(-1, vocab_size), size)]
    return torch.cat(best).view(*logits.shape[:-1], min(num, vocab_size))


def _best_of_lines(logits: Tensor, num: int) -> Tensor:
    last = logits.shape[-1] - 1
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    packed = bits.long().bitwise_left_shift_(32)
    packed |= torch.arange(last, -1, -1, device=logits.device)
    best = packed.topk(min(num, last + 1)).values
    return last - (best & 0xFFFFFFFF)


def _entropy(logprobs: Tensor) -> Tensor:
    """The entropy of distributions [..., V] in nats, [...] fp32; NaN if a distribution holds NaN."""
    terms = -logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)  # 0, not NaN, for impossible tokens
    return torch.where(logprobs[..., 0].isnan(), torch.nan, exact_sum(terms)).float()

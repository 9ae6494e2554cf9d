"""What is read off the logits: drawn tokens, whose noise depends on (seed, position) only, and log-probabilities.

Host work (`Draws`) and device work (`draw`) are apart; no Python loop over lines, and nothing waits for the device.
What a line gets depends, bit for bit, on nothing but itself: log_softmax works line by line, where logsumexp changes
its order of summation with the size of the batch.

Sizes: B lines of a batch, b of them drawn at random, V vocabulary, n best tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.sampling.filters import FILTERS, Filter, exact_sum, pick, to_weights
from model.sampling.params import SamplingParams
from model.sampling.penalties import History, Penalties

COLDEST = 1e-20  # of the temperatures above 0: a colder one would change no draw, but overflow
# A line of scores over 267,735 words is 1 MB, and some steps keep many copies: they take as many lines as fit at once.
SCRATCH_BYTES = {"cpu": 2**26, "cuda": 2**30}
BYTES_TO_SCORE = 24  # for each score of a line: logits, log-probabilities and what `_best` or `_entropy` keeps
BYTES_TO_DRAW = 96  # fixed-point weights, their copies in order, and the double precision of typical_p


class Drawn(NamedTuple):
    """Drawn tokens. Log-probabilities are under softmax(logits): temperature 1, nothing cut, nothing penalised."""

    tokens: Tensor  # [B] int64
    logprobs: Tensor  # [B] fp32; not finite where a line's logits are not
    top_ids: Tensor | None  # [B, n] int64, the best first; n = the largest `num_top`, None if it is 0
    top_logprobs: Tensor | None  # [B, n] fp32


class Scored(NamedTuple):
    """Figures of given tokens; None where not asked for."""

    logprobs: Tensor  # [...] fp32, nats
    ranks: Tensor  # [...] int64, 0 = the most probable
    top_ids: Tensor | None  # [..., n] int64, the best first
    top_logprobs: Tensor | None  # [..., n] fp32
    entropies: Tensor | None  # [...] fp32, nats


class RandomLines:
    """Lines of a batch that are drawn at random, together."""

    def __init__(self, samplings: Sequence[SamplingParams], lines: Sequence[int], device: torch.device | str) -> None:
        own = [samplings[line] for line in lines]
        self.places = list(lines)
        self.lines = torch.tensor(self.places, dtype=torch.int64, device=device)  # [b]
        self.seeds = np.array([one.seed for one in own], dtype=np.uint64)  # [b]
        self.temperature = _column([max(one.temperature, COLDEST) for one in own], torch.float32, device)  # [b, 1]
        self.filters = _filters(own, device)

    def draw(self, scores: Tensor, positions: Sequence[int]) -> Tensor:
        """Tokens [b] from the scores [B, V] and positions [B] of the whole batch."""
        probabilities = torch.softmax(scores[self.lines] / self.temperature, -1)  # [b, V]
        weights = to_weights(probabilities)
        for one in self.filters:
            one.apply(weights)
        uniform = uniform_noise(self.seeds, np.asarray(positions)[self.places])
        return pick(weights, torch.from_numpy(uniform).to(scores.device))


class Draws:
    """How the lines of a batch are drawn. Prepared once per batch composition, used for many steps."""

    def __init__(self, samplings: Sequence[SamplingParams], *, device: torch.device | str = "cpu") -> None:
        self.penalties = Penalties(samplings, device=device)
        self.num_top = max((one.num_top for one in samplings), default=0)
        self._samplings, self._device = list(samplings), device
        self._random = [line for line, one in enumerate(samplings) if one.temperature > 0]  # the others are greedy
        self._groups: dict[int, list[RandomLines]] = {}

    def groups(self, size: int) -> list[RandomLines]:
        """The lines that are drawn at random, `size` at a time."""
        if size not in self._groups:
            starts = range(0, len(self._random), size)
            some = [self._random[start : start + size] for start in starts]
            self._groups[size] = [RandomLines(self._samplings, lines, self._device) for lines in some]
        return self._groups[size]

    @property
    def penalised(self) -> bool:
        """Whether some line must know what occurred in its row."""
        return self.penalties.penalised


def draw(
    logits: Tensor,
    draws: Draws,
    *,
    positions: Sequence[int],
    num_generated: Sequence[int],
    history: History | None = None,
    rows: Sequence[int] = (),
) -> Drawn:
    """Draw one token a line: the best where greedy, else from the cumulative distribution at one uniform number.

    In this order: repetition, frequency and presence penalties, bias, bans of end tokens; then for greedy lines the
    best (the first of equals), for the others temperature, top_k, top_p, typical_p, min_p, each on what is left.

    Args:
        logits: [B, V] fp32.
        positions: the number of tokens before the drawn one, for each line.
        num_generated: of those, the generated ones.
        history, rows: what occurred, and the row of each line in it; needed where a line is penalised.
    """
    scores = draws.penalties.apply(logits, num_generated=num_generated, history=history, rows=rows)
    tokens = scores.argmax(-1)
    size = lines_at_once(logits.shape[-1], bytes_per_score=BYTES_TO_DRAW, device=logits.device)
    for group in draws.groups(size):
        tokens[group.lines] = group.draw(scores, positions)
    logprobs = logits.log_softmax(-1)
    top_ids = _best(logits, draws.num_top) if draws.num_top else None
    top_logprobs = logprobs.gather(-1, top_ids) if top_ids is not None else None
    return Drawn(tokens, logprobs.gather(-1, tokens[:, None])[:, 0], top_ids, top_logprobs)


def score_targets(logits: Tensor, targets: Tensor, *, num_top: int = 0, entropy: bool = False) -> Scored:
    """Log-probabilities and ranks of given tokens; beside them the best tokens, and the entropy of the distribution.

    Args:
        logits: [..., V] fp32.
        targets: [...] int64.
    """
    logprobs = logits.log_softmax(-1)  # [..., V]
    own = logprobs.gather(-1, targets[..., None])[..., 0]
    ranks = (logits > logits.gather(-1, targets[..., None])).sum(-1)
    top_ids = _best(logits, num_top) if num_top else None
    top_logprobs = logprobs.gather(-1, top_ids) if top_ids is not None else None
    return Scored(own, ranks, top_ids, top_logprobs, _entropy(logprobs) if entropy else None)


def join_scored(parts: Sequence[Scored]) -> Scored:
    """Figures of stretches that follow one another as those of one."""
    if len(parts) == 1:
        return parts[0]
    logprobs, ranks, top_ids, top_logprobs, entropies = zip(*parts, strict=True)
    return Scored(torch.cat(logprobs), torch.cat(ranks), *map(_joined, (top_ids, top_logprobs, entropies)))


def lines_at_once(vocab_size: int, *, bytes_per_score: int, device: torch.device, least: int = 1) -> int:
    """How many lines of scores to work on at a time, a power of two: as many as SCRATCH_BYTES allow, but `least`."""
    fitting = SCRATCH_BYTES[device.type] // (bytes_per_score * vocab_size)
    return max(least, 1 << max(0, fitting.bit_length() - 1))


def uniform_noise(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), a pure function of (seed, position): SplitMix64 (Steele et al. 2014) applied to both in turn.

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
    """The filters that some line uses, in the order of their application."""
    filters = []
    for kind in FILTERS:
        off = getattr(SamplingParams, kind.parameter)
        used = {line: value for line, one in enumerate(samplings) if (value := getattr(one, kind.parameter)) != off}
        if used:
            values = list(used.values())
            lines, column = torch.tensor(list(used), device=device), _column(values, kind.dtype, device)
            filters.append(Filter(kind.keep(values), lines, column))
    return filters


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """None where none was asked for."""
    asked = [part for part in parts if part is not None]
    return torch.cat(asked) if asked else None


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None]


def _best(logits: Tensor, num: int) -> Tensor:
    """The tokens of the largest logits, the best and of equals the first first, [..., min(num, V)] int64.

    topk alone leaves open which of equals it takes, and with bf16 weights equals are common. So logit and token are
    packed into one integer; read as integers, the bits of floats are in order once those of negative ones are flipped.
    """
    vocab_size = logits.shape[-1]
    size = lines_at_once(vocab_size, bytes_per_score=BYTES_TO_SCORE, device=logits.device)
    best = [_best_of_some(lines, num) for lines in torch.split(logits.reshape(-1, vocab_size), size)]
    return torch.cat(best).view(*logits.shape[:-1], min(num, vocab_size))


def _best_of_some(logits: Tensor, num: int) -> Tensor:
    last = logits.shape[-1] - 1
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 makes one zero of two
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    packed = bits.long().bitwise_left_shift_(32)
    packed |= torch.arange(last, -1, -1, device=logits.device)
    best = packed.topk(min(num, last + 1)).values
    return last - (best & 0xFFFFFFFF)


def _entropy(logprobs: Tensor) -> Tensor:
    """Of distributions [..., V] in nats, [...] fp32; NaN where they hold NaN."""
    terms = -logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)  # 0, not NaN, where impossible
    return torch.where(logprobs[..., 0].isnan(), torch.nan, exact_sum(terms)).float()

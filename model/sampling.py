"""What is read off the logits: drawn tokens, whose noise depends on (seed, position) only, and log-probabilities.

Sizes: B rows, V vocabulary. Host work (`Draws`) and device work (`draw`) are apart; no Python loop over rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Draws:
    """How the rows of a batch are drawn, one entry a row. Prepared once per batch composition, used for many steps."""

    def __init__(
        self,
        *,
        temperatures: Sequence[float],
        top_ks: Sequence[int],
        top_ps: Sequence[float],
        min_ps: Sequence[float],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        """temperatures: 0 = greedy; top_ks: 0 = off; top_ps: 1 = off; min_ps: 0 = off; seeds: u64."""

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]  # [B, 1]

        self.greedy = not any(temperatures)
        self.is_greedy = column([t == 0 for t in temperatures], torch.bool)[:, 0]  # [B]
        self.temperature = column([t or 1.0 for t in temperatures], torch.float32)
        self.top_k = column(top_ks, torch.int64) if any(top_ks) else None
        self.top_p = column(top_ps, torch.float32) if any(p < 1 for p in top_ps) else None
        self.min_p = column(min_ps, torch.float32) if any(min_ps) else None
        self.seeds = np.array(seeds, dtype=np.uint64)  # [B]


def draw(logits: Tensor, draws: Draws, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draw one token a row: from the cumulative distribution at one uniform number, or the best where greedy.

    Args:
        logits: [B, V] fp32.
        positions: the number of tokens before the drawn one, for each row.

    Returns:
        tokens [B] int64, and their log-probabilities [B] under softmax(logits): temperature 1, nothing cut.
    """
    tokens = logits.argmax(-1)
    if not draws.greedy:
        uniform = torch.from_numpy(uniform_noise(draws.seeds, np.asarray(positions))).to(logits.device)
        drawn = _invert(_distribution(logits, draws), uniform)
        tokens = torch.where(draws.is_greedy, tokens, drawn)
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    return tokens, chosen - logits.logsumexp(-1)


def target_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (nats, fp32) of given tokens and their ranks (0 = the most probable).

    Args:
        logits: [..., V] fp32.
        targets: [...] int64.
    """
    chosen = logits.gather(-1, targets[..., None])
    return (chosen[..., 0] - logits.logsumexp(-1)), (logits > chosen).sum(-1)


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


def _distribution(logits: Tensor, draws: Draws) -> Tensor:
    """Temperature, then top_k, then top_p of what is left, then min_p: unnormalised probabilities [B, V]."""
    probabilities = torch.softmax(logits / draws.temperature, -1)
    floor = torch.zeros_like(draws.temperature)  # [B, 1]: what is less probable is cut; ties at the edge stay
    if draws.top_k is not None or draws.top_p is not None:
        ordered = probabilities.sort(-1, descending=True).values
        if draws.top_k is not None:
            last = torch.where(draws.top_k > 0, draws.top_k, ordered.shape[-1]).clamp(max=ordered.shape[-1]) - 1
            floor = ordered.gather(-1, last)
            ordered = ordered * (ordered >= floor)
        if draws.top_p is not None:
            share = ordered / ordered.sum(-1, keepdim=True)
            kept = (share.cumsum(-1) - share < draws.top_p) & (share > 0)
            floor = torch.where(kept, ordered, torch.inf).amin(-1, keepdim=True).maximum(floor)
    if draws.min_p is not None:
        floor = torch.maximum(floor, draws.min_p * probabilities.amax(-1, keepdim=True))
    return probabilities * (probabilities >= floor)


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform share of the total, [B]."""
    cumulative = probabilities.double().cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)

"""How good a model is: the exact loss of a split in one pass, and the loss of streams that begin cold.

Both go through the baked model, the one that is served, and end in `model.scoring.Score`: /score gives the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from model.baked import BakedLM, score_document
from model.sampling import target_logprobs
from model.scoring import Score
from model.tokenizer import Tokenizer

COLD_LENGTHS = (64, 256)  # tokens of a fresh stream
COLD_STREAMS = 64


@dataclass(frozen=True)
class Evaluation:
    """The figures of one split."""

    score: Score  # every token after the first, each seeing all the past its spans reach
    cold: dict[int, Score]  # of the first n tokens of fresh streams


def evaluate(model: BakedLM, tokenizer: Tokenizer, tokens: np.ndarray, *, label: str = "evaluate") -> Evaluation:
    """Score a whole split.

    Args:
        tokens: [n] integers, n >= 2.
        label: what the progress bar is called.
    """
    score = score_tokens(model, tokenizer, tokens, label=label)
    return Evaluation(score, cold_start(model, tokenizer, tokens))


def score_tokens(model: BakedLM, tokenizer: Tokenizer, tokens: np.ndarray, *, label: str = "score") -> Score:
    """The exact score of tokens[1:] given everything before each of them, in one pass at flat memory."""
    logprobs: list[float] = []
    with tqdm(total=len(tokens) - 1, desc=label, unit="tok", unit_scale=True) as bar:
        for chunk, _ in score_document(model, tokens):
            logprobs += chunk.tolist()
            bar.update(len(chunk))
    return Score.of(tokenizer, tokens[1:].tolist(), logprobs)


def cold_start(
    model: BakedLM, tokenizer: Tokenizer, tokens: np.ndarray, *, lengths: Sequence[int] = COLD_LENGTHS
) -> dict[int, Score]:
    """Scores of the first tokens of fresh streams that begin at evenly spaced places of a split.

    Returns:
        for each of `lengths` that the split is long enough for, the score of that many tokens of every stream.
    """
    lengths = [length for length in lengths if length < len(tokens)]
    if not lengths:
        return {}
    longest = max(lengths)
    starts = np.linspace(0, len(tokens) - longest - 1, COLD_STREAMS).astype(np.int64)
    windows = np.stack([tokens[start : start + longest + 1] for start in starts]).astype(np.int64)
    batch = torch.from_numpy(windows).to(model.device)
    hidden, _ = model.extend(batch[:, :-1], model.allocate(COLD_STREAMS), range(COLD_STREAMS))
    logprobs = torch.stack(
        [target_logprobs(model.logits(line), targets)[0] for line, targets in zip(hidden, batch[:, 1:], strict=True)]
    )
    return {
        length: Score.of(tokenizer, windows[:, 1 : length + 1].ravel().tolist(), logprobs[:, :length].ravel().tolist())
        for length in lengths
    }

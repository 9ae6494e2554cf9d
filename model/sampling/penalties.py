"""Changes to logits before a token is chosen: penalties on tokens that occurred, biases, and bans of end tokens.

Owns the record of the tokens that occurred (`History`) and the adjustments of a batch (`Penalties`). A line without
adjustments keeps its logits bit for bit, so the results of a line never depend on other lines.

Sizes: R rows of the server's state, B lines of a batch, b penalised lines, V vocabulary, T tokens of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.sampling.params import SamplingParams


@dataclass(frozen=True)
class HistorySnapshot:
    """A copy of one row's history."""

    seen: Tensor  # [V] bool
    counts: Tensor  # [V] int32


class History:
    """The tokens that occurred in each row: whether in the prompt, and how often in the output."""

    def __init__(self, num_rows: int, vocab_size: int, *, device: torch.device | str = "cpu") -> None:
        self.seen = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)  # [R, V]
        self.counts = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device)  # [R, V]

    @property
    def bytes_per_row(self) -> int:
        """Size of the history of one row, in bytes."""
        return self.seen[0].nbytes + self.counts[0].nbytes

    def reset(self, row: int) -> None:
        """Clear the history of a row for a fresh stream."""
        self.seen[row].zero_()
        self.counts[row].zero_()

    def move(self, source: int, target: int) -> None:
        """Copy the history of row `source` over row `target`."""
        self.seen[target].copy_(self.seen[source])
        self.counts[target].copy_(self.counts[source])

    def snapshot(self, row: int) -> HistorySnapshot:
        """A copy of the history of a row."""
        return HistorySnapshot(self.seen[row].clone(), self.counts[row].clone())

    def restore(self, row: int, snapshot: HistorySnapshot) -> None:
        """Set the history of a row to a snapshot."""
        self.seen[row].copy_(snapshot.seen)
        self.counts[row].copy_(snapshot.counts)

    def read(self, row: int, tokens: Tensor) -> None:
        """Record tokens [T] int64 of the prompt of a row."""
        self.seen[row].index_fill_(0, tokens, True)

    def feed(self, rows: Tensor, tokens: Tensor) -> None:
        """Count output tokens [n] int64; token i belongs to rows[i], and a row may occur more than once in `rows`."""
        self._add(rows, tokens, 1)

    def unfeed(self, rows: Tensor, tokens: Tensor) -> None:
        """Undo a `feed`."""
        self._add(rows, tokens, -1)

    def _add(self, rows: Tensor, tokens: Tensor, amount: int) -> None:
        amounts = torch.full_like(tokens, amount, dtype=torch.int32)
        self.counts.index_put_((rows, tokens), amounts, accumulate=True)


class Penalties:
    """The adjustments of a batch, prepared once per batch composition; an unused adjustment costs nothing."""

    def __init__(self, samplings: Sequence[SamplingParams], *, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._penalised = [line for line, params in enumerate(samplings) if params.is_penalised]
        self._lines = torch.tensor(self._penalised, dtype=torch.int64, device=device)  # [b]
        penalties = [
            (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
            for params in (samplings[line] for line in self._penalised)
        ]
        columns = torch.tensor(penalties, dtype=torch.float32, device=device).view(-1, 3, 1)
        self._repetition, self._frequency, self._presence = columns.unbind(1)  # each [b, 1]
        biases: dict[tuple[int, int], float] = {}  # by (line, token); a repeated token gets the sum
        for line, params in enumerate(samplings):
            for token, bias in params.logit_bias:
                biases[line, token] = biases.get((line, token), 0.0) + bias
        self._biased = self._to_device(np.array(list(biases), dtype=np.int64).reshape(-1, 2))  # line, token
        self._bias = torch.tensor(list(biases.values()), dtype=torch.float32, device=device)
        bans = [
            (line, token, params.min_new_tokens)
            for line, params in enumerate(samplings)
            if params.min_new_tokens
            for token in params.end_ids
        ]
        self._bans = np.array(bans, dtype=np.int64).reshape(
            -1, 3
        )  # line, token, first number of generated tokens without ban

    @property
    def penalised(self) -> bool:
        """Whether some line needs a history."""
        return bool(self._penalised)

    def apply(
        self, logits: Tensor, *, num_generated: Sequence[int], history: History | None, rows: Sequence[int]
    ) -> Tensor:
        """The adjusted logits, [B, V]; `logits` itself if the batch has no adjustment.

        A line whose every token is banned keeps its logits, since it must draw a token.

        Args:
            logits: [B, V] fp32.
            num_generated: how many tokens each line has generated.
            history, rows: the tokens that occurred, and the row of each line in `history`; required if a line is
                penalised.
        """
        bans = self._bans[np.asarray(num_generated)[self._bans[:, 0]] < self._bans[:, 2]]
        if not (self._penalised or len(self._bias) or len(bans)):
            return logits
        scores = logits.clone()
        if self._penalised:
            assert history is not None, "penalties need a history"
            source = self._to_device(np.asarray(rows, dtype=np.int64)[self._penalised])
            scores[self._lines] = self._penalise(logits[self._lines], history.seen[source], history.counts[source])
        if len(self._bias):
            scores[self._biased.unbind(1)] += self._bias
        if len(bans):
            scores[self._to_device(bans[:, :2]).unbind(1)] = float("-inf")
        best = scores.amax(-1, keepdim=True)
        return torch.where(best == float("-inf"), logits, scores)

    def _penalise(self, logits: Tensor, seen: Tensor, counts: Tensor) -> Tensor:
        """Apply the repetition (Keskar et al. 2019, arXiv 1909.05858), frequency and presence penalties; all [b, V]."""
        present = counts > 0
        repeated = torch.where(logits > 0, logits / self._repetition, logits * self._repetition)
        scores = torch.where(seen | present, repeated, logits)
        return scores - self._frequency * counts - self._presence * present

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

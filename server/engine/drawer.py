"""Draws tokens from logits. A line is the logits of one row.

If the model can draw, it draws the plain lines (`SamplingParams.is_plain`); `model.sampling` draws all other lines. How
a line is drawn depends on its own parameters only, never on other lines. Sizes: B lines, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.frozen.native.library import DRAW
from model.frozen.served import ServedLM
from model.sampling.draw import Draws, draw
from model.sampling.params import SamplingParams
from model.sampling.penalties import History
from server.engine.sequence import Draw, Drawn


@runtime_checkable
class DrawsInside(Protocol):
    """A model that draws plain lines inside its own step."""

    def decode_and_draw(
        self, tokens: NDArray[np.int64], cache: Any, *, rows: NDArray[np.int64], draws: NDArray[np.void], commit: bool
    ) -> Any:
        """Feed a token to each of some rows and draw their next tokens."""
        ...

    def draw(self, logits: Tensor, draws: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return tokens [B] drawn from logits [B, V], and their log-probabilities [B]."""
        ...


class Prepared(NamedTuple):
    """The sampling parameters of a batch, arranged for drawing; valid as long as the batch stays the same."""

    samplings: list[SamplingParams]
    plain: NDArray[np.void]  # [B] of dtype `DRAW`, for the model's own step
    lines: list[int]  # the lines that `model.sampling` draws
    others: Draws  # parameters of the lines in `lines`


class Drawer:
    """The drawing of tokens for the rows of a runner. Owns each row's history of tokens, which penalties use."""

    def __init__(self, model: ServedLM, *, num_rows: int) -> None:
        self.inside = model if isinstance(model, DrawsInside) else None
        self.history = History(num_rows, model.config.vocab_size, device=model.device)
        self._device = model.device
        self._prepared: Prepared | None = None

    def prepare(self, draws: Sequence[Draw]) -> Prepared:
        """Arrange the parameters of a decoding batch. A batch of the very same objects is arranged only once."""
        if self._prepared is None or not _same(self._prepared.samplings, draws):
            self._prepared = self._arrange(draws)
        elif self.inside is not None:
            self._prepared.plain["position"] = [draw.position for draw in draws]
        return self._prepared

    def _arrange(self, draws: Sequence[Draw]) -> Prepared:
        samplings = [draw.sampling for draw in draws]
        inside = self.inside is not None
        lines = [line for line, sampling in enumerate(samplings) if not (inside and sampling.is_plain)]
        plain = np.zeros(len(samplings), DRAW)
        plain["temperature"] = [sampling.temperature for sampling in samplings]
        plain["seed"] = np.array([sampling.seed for sampling in samplings], np.uint64)
        plain["position"] = [draw.position for draw in draws]
        return Prepared(samplings, plain, lines, Draws([samplings[line] for line in lines], device=self._device))

    def draw(self, logits: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> list[Drawn]:
        """Draw a token for each line of the logits [B, V]; `rows` has the row of each line."""
        return self._draw(logits, self._arrange(draws), draws, rows)

    def _draw(self, logits: Tensor, prepared: Prepared, draws: Sequence[Draw], rows: Sequence[int]) -> list[Drawn]:
        if self.inside is None or len(prepared.lines) == len(draws):
            return self._draw_others(logits, prepared, draws, rows)
        tokens, logprobs = self.inside.draw(logits, prepared.plain)
        return self._merge(tokens, logprobs, logits, prepared, draws, rows)

    def complete(
        self, decoded: Any, prepared: Prepared, draws: Sequence[Draw], rows: Sequence[int], fed: Sequence[int]
    ) -> list[Drawn]:
        """Return the tokens of all lines after a step that drew the plain lines; the other lines are drawn here.

        Args:
            decoded: the result of `decode_and_draw`.
            fed: the token that the step fed to each row; it counts for penalties.
        """
        lines = prepared.lines
        with self._fed(prepared, [rows[line] for line in lines], [fed[line] for line in lines]):
            return self._merge(decoded.tokens, decoded.logprobs, decoded.logits, prepared, draws, rows)

    def draw_fed(self, logits: Tensor, draws: Sequence[Draw], rows: Sequence[int], fed: Sequence[int]) -> list[Drawn]:
        """Count each row's `fed` token for its penalties, then draw; if drawing fails, the tokens are not counted."""
        prepared = self.prepare(draws)
        with self._fed(prepared, rows, fed):
            return self._draw(logits, prepared, draws, rows)

    def _fed(self, prepared: Prepared, rows: Sequence[int], fed: Sequence[int]) -> "_Fed":
        return _Fed(self.history if prepared.others.penalised else None, rows, fed, self._device)

    def _merge(
        self,
        tokens: NDArray[np.int64],
        logprobs: NDArray[np.float32],
        logits: Tensor,
        prepared: Prepared,
        draws: Sequence[Draw],
        rows: Sequence[int],
    ) -> list[Drawn]:
        drawn = list(map(Drawn, tokens.tolist(), logprobs.tolist()))
        if lines := prepared.lines:
            some = self._draw_others(
                logits[lines], prepared, [draws[line] for line in lines], [rows[line] for line in lines]
            )
            for line, one in zip(lines, some, strict=True):
                drawn[line] = one
        return drawn

    def _draw_others(
        self, logits: Tensor, prepared: Prepared, draws: Sequence[Draw], rows: Sequence[int]
    ) -> list[Drawn]:
        """Draw lines with `model.sampling`. On a GPU, the host waits for the device only here."""
        batch = draw(
            logits,
            prepared.others,
            positions=[one.position for one in draws],
            num_generated=[one.num_generated for one in draws],
            history=self.history,
            rows=rows,
        )
        tokens, logprobs = batch.tokens.tolist(), batch.logprobs.tolist()
        if batch.top_ids is None or batch.top_logprobs is None:
            return list(map(Drawn, tokens, logprobs))
        top = zip(batch.top_ids.tolist(), batch.top_logprobs.tolist(), draws, strict=True)
        tops = [tuple(zip(ids, values, strict=True))[: one.sampling.num_top] for ids, values, one in top]
        return list(map(Drawn, tokens, logprobs, tops))


class _Fed:
    """A context in which the fed tokens count for penalties; if it ends with an exception, they are uncounted."""

    def __init__(self, history: History | None, rows: Sequence[int], fed: Sequence[int], device: torch.device) -> None:
        self._history = history
        if history is not None:
            self._rows = torch.tensor(rows, dtype=torch.int64).to(device)
            self._tokens = torch.tensor(fed, dtype=torch.int64).to(device)

    def __enter__(self) -> None:
        if self._history is not None:
            self._history.feed(self._rows, self._tokens)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._history is not None and kind is not None:
            self._history.unfeed(self._rows, self._tokens)


def _same(samplings: Sequence[SamplingParams], draws: Sequence[Draw]) -> bool:
    """Return whether the draws have these very objects, as they do while the rows of a batch stay the same."""
    return len(samplings) == len(draws) and all(a is b.sampling for a, b in zip(samplings, draws, strict=True))

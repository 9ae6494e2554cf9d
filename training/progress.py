"""The terminal of a training run: its progress bar, and the signals that stop it."""

import math
import signal
import sys
from types import FrameType, TracebackType
from typing import Self

from tqdm import tqdm

from training.loop import Report

SMOOTHING = 0.95  # of the displayed loss: about the mean of the last 20 steps


def redraw_seconds() -> float:
    """Seconds between two redraws of a bar; a log file needs few redraws."""
    return 0.1 if sys.stderr.isatty() else 30.0


class ProgressBar:
    """A progress bar of a run: share done, loss in bits per byte, tokens per second, remaining time."""

    def __init__(self, *, nats_per_bit: float, valid_nats_per_bit: float, share: float) -> None:
        """nats_per_bit: nats per token that equal one bit per byte; share: share of the run that is done, 0 .. 1."""
        self._nats_per_bit, self._valid_nats_per_bit = nats_per_bit, valid_nats_per_bit
        layout = "{percentage:5.1f}% |{bar:24}| {elapsed}<{remaining} {postfix}"
        pause = redraw_seconds()
        self._bar = tqdm(total=1.0, initial=share, bar_format=layout, mininterval=pause, maxinterval=pause)
        self._loss = math.nan

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, report: Report, *, share: float) -> None:
        """Show the report of a step."""
        old = self._loss if math.isfinite(self._loss) else report.loss
        self._loss = SMOOTHING * old + (1 - SMOOTHING) * report.loss
        rate = report.tokens / report.seconds
        self._bar.set_postfix_str(
            f"step {report.step}, {self._loss / self._nats_per_bit:.3f} bits/byte, {rate:,.0f} tokens/s", refresh=False
        )
        self._bar.update(share - self._bar.n)

    def note(self, report: Report, *, valid: float) -> None:
        """Print a line above the bar. valid: nats per token on the validation split."""
        train, valid = self._loss / self._nats_per_bit, valid / self._valid_nats_per_bit
        self._bar.write(
            f"step {report.step:7d}  {report.seconds:7.0f} s  train {train:.4f}  valid {valid:.4f} bits/byte  "
            f"lr {report.learning_rate:.2e}  gradient {report.gradient_norm:.2f}"
        )


class StopSignal:
    """A handler that turns the first SIGINT or SIGTERM into a flag, read between steps; the second acts as usual."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

"""Monitoring of a training run: the progress bar on the terminal and the record beside the bundle.

Only rank 0 shows and records; on other ranks the methods do nothing.
"""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from training.loop import Report, Run
from training.progress import ProgressBar
from training.record import Record


class Watch:
    """The progress bar and the record of a run, which receive the same events."""

    def __init__(self, run: Run, folder: Path, *, nats_per_bit: float, valid_nats_per_bit: float) -> None:
        """folder: of the record; the other arguments: nats per token that equal one bit per byte."""
        self._run = run
        self._folder = folder
        self._units = {"nats_per_bit": nats_per_bit, "valid_nats_per_bit": valid_nats_per_bit}
        self._open = ExitStack()
        self._bar_and_record: tuple[ProgressBar, Record] | None = None

    def __enter__(self) -> Self:
        if self._run.devices.is_first:
            record = Record(self._folder, resume_step=self._run.step_count, **self._units)
            bar = ProgressBar(share=self._run.share, **self._units)
            self._bar_and_record = self._open.enter_context(bar), self._open.enter_context(record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def step(self, report: Report) -> None:
        """Show and record a finished step."""
        if self._bar_and_record:
            bar, record = self._bar_and_record
            bar.show(report, share=self._run.share)
            record.step(report)

    def look(self, report: Report, *, valid: float) -> None:
        """Show and record a validation. valid: nats per token on the validation split."""
        if self._bar_and_record:
            bar, record = self._bar_and_record
            bar.note(report, valid=valid)
            record.look(report, valid=valid)
            record.spans(report, self._run.spans())

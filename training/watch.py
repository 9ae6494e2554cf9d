"""What a person sees of a run while it learns: the bar on the terminal and the record beside the bundle.

One process shows and records, that of rank 0; on the others nothing happens here.
"""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from training.loop import Report, Run
from training.progress import ProgressBar
from training.record import Record


class Watch:
    """The bar and the record of a run, told of the same events."""

    def __init__(self, run: Run, folder: Path, *, nats_per_bit: float, valid_nats_per_bit: float) -> None:
        """folder: of the record; the others: nats per token that make one bit per byte, as a token has many bytes."""
        self._run = run
        self._folder = folder
        self._units = {"nats_per_bit": nats_per_bit, "valid_nats_per_bit": valid_nats_per_bit}
        self._open = ExitStack()
        self._both: tuple[ProgressBar, Record] | None = None

    def __enter__(self) -> Self:
        if self._run.devices.is_first:
            record = Record(self._folder, resume_step=self._run.step_count, **self._units)
            bar = ProgressBar(share=self._run.share, **self._units)
            self._both = self._open.enter_context(bar), self._open.enter_context(record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def step(self, report: Report) -> None:
        """A step is done."""
        if self._both:
            bar, record = self._both
            bar.show(report, share=self._run.share)
            record.step(report)

    def look(self, report: Report, *, valid: float) -> None:
        """The validation split has been looked at. valid: nats per token."""
        if self._both:
            bar, record = self._both
            bar.note(report, valid=valid)
            record.look(report, valid=valid)
            record.spans(report, self._run.spans())

"""The record of a training run: metrics.jsonl for programs, and TensorBoard events for people.

A line of metrics.jsonl is one JSON object with `kind`, `step`, `tokens`, `seconds` and the metrics of its kind:
- "train": nats_per_token, bits_per_byte, gradient_norm and tokens_per_second are means over the last `num_steps` steps,
  gradient_norm_max is the maximum over them, and learning_rate is that of the last step. A line is written whenever the
  step count has grown by 0.1 %. So each of the first thousand steps has a line, and 500,000 steps have 7,000 lines
  (2 MB), which is as fine as a picture can show.
- "valid": nats_per_token and bits_per_byte on the validation split.
- "spans": the learned span of every head in tokens, one list for each layer.

A run that resumes from a checkpoint first drops the lines after it, so no step is recorded twice. Steps between the
last remaining line and the checkpoint may be missing, but no line is wrong.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

from training.loop import Report

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
GROWTH = 1.001  # factor of the step count from one line to the next
FLUSH_SECONDS = 10  # for TensorBoard's events; a line of metrics.jsonl is written at once

COMMON_KEYS = {"kind", "step", "tokens", "seconds"}  # keys of every line

Line = dict[str, Any]


class RecordError(ValueError):
    """A record cannot be read or written; the message names the file."""


class Record:
    """The writer of the record of a run. Under torchrun only rank 0 writes."""

    def __init__(self, folder: Path, *, resume_step: int, nats_per_bit: float, valid_nats_per_bit: float) -> None:
        """Continue the record in `folder`, or start a record there.

        Args:
            resume_step: the last step of the checkpoint, 0 for a fresh run; lines of later steps are dropped.
            nats_per_bit: nats per token that equal one bit per byte on the training split.
            valid_nats_per_bit: the same on the part of the validation split that is used while training.

        Raises:
            RecordError: the folder cannot be written.
        """
        # The import takes a third of a second, so only a process that writes makes it.
        from torch.utils.tensorboard import SummaryWriter

        self._nats_per_bit, self._valid_nats_per_bit = nats_per_bit, valid_nats_per_bit
        self._path = folder / METRICS
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            kept = _drop_after(self._path, step=resume_step)
            if resume_step == 0:
                shutil.rmtree(folder / EVENTS, ignore_errors=True)
            self._file = self._path.open("a", encoding="utf-8")
            self._events = SummaryWriter(folder / EVENTS, purge_step=resume_step + 1, flush_secs=FLUSH_SECONDS)
        train_lines = [line for line in kept if line["kind"] == "train"]
        self._last_line = (train_lines[-1]["tokens"], train_lines[-1]["seconds"]) if train_lines else (0, 0.0)
        self._last_line_step = resume_step
        self._pending: list[Report] = []  # reports since the last line

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an OSError into a RecordError that names the file."""
        try:
            yield
        except OSError as error:
            raise RecordError(f"{self._path} or what lies beside it cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, report: Report) -> None:
        """Record a training step. It is written with the other steps since the last line when the next line is due.

        Raises:
            RecordError: the file cannot be written; the methods below raise it too.
        """
        self._pending.append(report)
        if report.step >= GROWTH * self._last_line_step:
            with self._writing():
                self._write_pending()

    def look(self, report: Report, *, valid: float) -> None:
        """Record a validation: the loss on the validation split, in nats per token, after a step."""
        with self._writing():
            figures = _loss(valid, self._valid_nats_per_bit)
            self._write("valid", report, figures)
            for name, figure in figures.items():
                self._scalar(f"valid/{name}", figure, report.step)
            self._events.flush()

    def spans(self, report: Report, spans: Sequence[Sequence[float]]) -> None:
        """Record the spans of all heads after a step, in tokens, one list for each layer."""
        all_spans = [float(span) for layer in spans for span in layer]
        figures = {"spans/mean": sum(all_spans) / len(all_spans), "spans/longest": max(all_spans)}
        figures |= {f"spans/layer_{i:02d}_mean": sum(layer) / len(layer) for i, layer in enumerate(spans)}
        with self._writing():
            self._write("spans", report, {"spans": [[round(float(span), 1) for span in layer] for layer in spans]})
            for tag, figure in figures.items():
                self._scalar(tag, figure, report.step)

    def close(self) -> None:
        """Write the pending steps and close the files."""
        with self._writing(), closing(self._events), self._file:
            if self._pending:
                self._write_pending()

    def _write_pending(self) -> None:
        reports, last = self._pending, self._pending[-1]
        num = len(reports)
        tokens, seconds = self._last_line
        figures = {
            **_loss(sum(report.loss for report in reports) / num, self._nats_per_bit),
            "gradient_norm": sum(report.gradient_norm for report in reports) / num,
            "gradient_norm_max": max(report.gradient_norm for report in reports),
            "learning_rate": last.learning_rate,
            "tokens_per_second": (last.tokens - tokens) / max(last.seconds - seconds, 1e-9),
        }
        self._write("train", last, {"num_steps": num, **figures})
        tags = {"nats_per_token": "train/nats_per_token", "bits_per_byte": "train/bits_per_byte", "learning_rate": "lr"}
        for name, figure in figures.items():
            self._scalar(tags.get(name, name), figure, last.step)
        self._last_line, self._last_line_step, self._pending = (last.tokens, last.seconds), last.step, []

    def _write(self, kind: str, report: Report, figures: Line) -> None:
        head = {"kind": kind, "step": report.step, "tokens": report.tokens, "seconds": round(report.seconds, 3)}
        self._file.write(json.dumps(head | {name: _short(figure) for name, figure in figures.items()}) + "\n")
        self._file.flush()

    def _scalar(self, tag: str, value: float, step: int) -> None:
        self._events.add_scalar(tag, value, step)


def read_metrics(place: Path) -> list[Line]:
    """The lines of a record, oldest first. An incomplete last line is skipped, because a run may be writing it.

    Args:
        place: the folder of a `Record`, or its metrics.jsonl.

    Raises:
        RecordError: the file cannot be read, or a line is not a line of a record.
    """
    path = place / METRICS if place.is_dir() else place
    lines = []
    for number, text in enumerate(_whole_lines(path), 1):
        line = _parse(text)
        if line is None:
            raise RecordError(f"{path}, line {number}: {text[:60]!r} is not a line of a training record")
        lines.append(line)
    return lines


def _drop_after(path: Path, *, step: int) -> list[Line]:
    """Remove the lines of later steps from the file, and return the remaining lines.

    Invalid lines are removed too: a machine that died may leave anything at the end of the file, and a broken record
    must not prevent the run from resuming.
    """
    if not path.exists():
        return []
    lines = [line for text in _whole_lines(path) if (line := _parse(text)) and line["step"] <= step]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    temporary = path.with_name(path.name + ".writing")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return lines


def _whole_lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    return content.decode("utf-8", errors="replace").split("\n")[:-1]


def _parse(text: str) -> Line | None:
    """A line of the file as an object, or None if it is not a line of a record."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    is_valid = isinstance(line, dict) and line.keys() >= COMMON_KEYS and isinstance(line["step"], int)
    return line if is_valid else None


def _loss(nats: float, nats_per_bit: float) -> dict[str, float]:
    return {"nats_per_token": nats, "bits_per_byte": nats / nats_per_bit}


def _short(figure: Any) -> Any:
    """Floats rounded to six digits: more digits are noise and would double the size of the file."""
    return float(f"{figure:.6g}") if isinstance(figure, float) else figure

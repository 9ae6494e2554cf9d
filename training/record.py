"""What a run leaves for those who watch it: metrics.jsonl, for programs, and TensorBoard events, for people.

A line of metrics.jsonl is one JSON object with `kind`, `step`, `tokens`, `seconds` and the figures of its kind:
- "train": means over the last `num_steps` steps: nats_per_token, bits_per_byte, gradient_norm, tokens_per_second; and
  gradient_norm_max, the worst of them, and learning_rate, the last. A line comes whenever the step count has grown by a
  thousandth, so each of the first thousand steps has one, and 500,000 steps have 7,000 (2 MB): everywhere as fine as a
  picture can show.
- "valid": nats_per_token and bits_per_byte on the validation split.
- "spans": the learned span of every head in tokens, a list for each layer.

A run that goes on from a checkpoint first drops what lies beyond it: no step is told twice. Steps between the last line
kept and the checkpoint may be missing, never wrong.
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
GROWTH = 1.001  # of the step count from one line to the next
FLUSH_SECONDS = 10  # TensorBoard's events; a line of metrics.jsonl is out at once

PLACE = {"kind", "step", "tokens", "seconds"}  # what every line has

Line = dict[str, Any]


class RecordError(ValueError):
    """A record that cannot be read or written; the message names the file."""


class Record:
    """Writes down the steps of a run. One process writes: under torchrun, that of rank 0."""

    def __init__(self, folder: Path, *, resume_step: int, nats_per_bit: float, valid_nats_per_bit: float) -> None:
        """Go on with the record in `folder`, or begin one.

        Args:
            resume_step: the step after which the run goes on, 0 for one that begins: all that is told of later steps is
                dropped.
            nats_per_bit: nats per token that make one bit per byte of the training split.
            valid_nats_per_bit: the same of what is looked at of the validation split.

        Raises:
            RecordError: the folder cannot be written.
        """
        # The import costs a third of a second, which only a process that writes shall pay.
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
        told = [line for line in kept if line["kind"] == "train"]
        self._told = (told[-1]["tokens"], told[-1]["seconds"]) if told else (0, 0.0)
        self._told_step = resume_step
        self._pending: list[Report] = []  # since the last line

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Name the file where the disk is full or refuses."""
        try:
            yield
        except OSError as error:
            raise RecordError(f"{self._path} or what lies beside it cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, report: Report) -> None:
        """Note a step of training. It is written with those since the last line, once a line is due.

        Raises:
            RecordError: the disk is full or refuses; so do the methods below.
        """
        self._pending.append(report)
        if report.step >= GROWTH * self._told_step:
            with self._writing():
                self._write_pending()

    def look(self, report: Report, *, valid: float) -> None:
        """Write the loss on the validation split, in nats per token, as of a step."""
        with self._writing():
            figures = _loss(valid, self._valid_nats_per_bit)
            self._write("valid", report, figures)
            for name, figure in figures.items():
                self._scalar(f"valid/{name}", figure, report.step)
            self._events.flush()

    def spans(self, report: Report, spans: Sequence[Sequence[float]]) -> None:
        """Write the spans of all heads, in tokens, a list for each layer, as of a step."""
        every = [float(span) for layer in spans for span in layer]
        figures = {"spans/mean": sum(every) / len(every), "spans/longest": max(every)}
        figures |= {f"spans/layer_{i:02d}_mean": sum(layer) / len(layer) for i, layer in enumerate(spans)}
        with self._writing():
            self._write("spans", report, {"spans": [[round(float(span), 1) for span in layer] for layer in spans]})
            for tag, figure in figures.items():
                self._scalar(tag, figure, report.step)

    def close(self) -> None:
        """Write what is still held back."""
        with self._writing(), closing(self._events), self._file:
            if self._pending:
                self._write_pending()

    def _write_pending(self) -> None:
        reports, last = self._pending, self._pending[-1]
        num = len(reports)
        tokens, seconds = self._told
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
        self._told, self._told_step, self._pending = (last.tokens, last.seconds), last.step, []

    def _write(self, kind: str, report: Report, figures: Line) -> None:
        head = {"kind": kind, "step": report.step, "tokens": report.tokens, "seconds": round(report.seconds, 3)}
        self._file.write(json.dumps(head | {name: _short(figure) for name, figure in figures.items()}) + "\n")
        self._file.flush()

    def _scalar(self, tag: str, value: float, step: int) -> None:
        self._events.add_scalar(tag, value, step)


def read_metrics(place: Path) -> list[Line]:
    """The lines of a record, oldest first. A last line that is not whole is passed over: a run may be writing it.

    Args:
        place: the folder of a `Record`, or its metrics.jsonl.

    Raises:
        RecordError: no such file, or a line in it is not of a record.
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
    """Rewrite the file without lines of later steps, and return the others.

    What is no whole line goes as well: a machine that died may leave anything at the end, and the record of a run must
    not be what keeps it from going on.
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
    """A line of the file, or None if it is not one."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    is_ours = isinstance(line, dict) and line.keys() >= PLACE and isinstance(line["step"], int)
    return line if is_ours else None


def _loss(nats: float, nats_per_bit: float) -> dict[str, float]:
    return {"nats_per_token": nats, "bits_per_byte": nats / nats_per_bit}


def _short(figure: Any) -> Any:
    """Floats of six digits: more are noise, and the file is half as long."""
    return float(f"{figure:.6g}") if isinstance(figure, float) else figure

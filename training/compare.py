"""`python -m training.compare RUN...`: the loss curves of several runs in one picture, and their results in a table.

A RUN is the folder of the record of a run (NAME.run), the bundle beside it (NAME), or a metrics.jsonl. Bits per byte
are comparable across tokenizers. The run need not be finished.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from training.plots import COLOURS, canvas, fit_loss, mark_of, png, short_number, subtitle, train_curve, valid_curve
from training.record import METRICS, Line, RecordError, read_metrics

UNITS = (
    ("hours", 3600),
    ("minutes", 60),
    ("seconds", 1),
)  # of time: the axis uses the first unit of which the longest run has two


@dataclass(frozen=True)
class Curves:
    """The name and the metrics of one run."""

    name: str
    metrics: list[Line]


def main(argv: Sequence[str]) -> int:
    """Read the runs, print the table and write the picture; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        places = [find_metrics(place) for place in args.runs]
        runs = [Curves(name, read_run(place)) for name, place in zip(names_of(args.runs, places), places, strict=True)]
        print(table(runs))
        args.out.write_bytes(draw(runs, x=args.x))
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {args.out} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}")
    return 0


def find_metrics(place: Path) -> Path:
    """The metrics.jsonl of a run.

    Raises:
        RecordError: `place` is not a run.
    """
    if place.is_file():
        return place
    beside = place.with_name(place.name + ".run") / METRICS
    for path in (place / METRICS, beside):
        if path.is_file():
            return path
    raise RecordError(f"{place} is not a run: there is neither {place / METRICS} nor {beside}")


def read_run(path: Path) -> list[Line]:
    """The lines of the metrics.jsonl of a run.

    Raises:
        RecordError: see `read_metrics`; also if the record has no training step.
    """
    metrics = read_metrics(path)
    if not any(line["kind"] == "train" for line in metrics):
        raise RecordError(f"{path} tells of no step yet")
    return metrics


def names_of(args: Sequence[Path], found: Sequence[Path]) -> list[str]:
    """A name for each run: the name of its folder, or the path as given if two folders have the same name."""
    short = [path.resolve().parent.name.removesuffix(".run") for path in found]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, args, strict=True)]


def table(runs: Sequence[Curves]) -> str:
    """The table of the runs: length, and best and last bits per byte on the valid split."""
    rows = [["run", "steps", "tokens", "seconds", "best valid", "at step", "last valid"], *map(_row, runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def draw(runs: Sequence[Curves], *, x: str) -> bytes:
    """The picture as PNG: one colour a run; a thick curve for the valid split, a thin curve for training."""
    figure, axes = canvas("Bits per byte", height=4.4)
    key, label, scale = _axis(x, longest=max(run.metrics[-1]["seconds"] for run in runs))
    curves: list[tuple[np.ndarray, np.ndarray]] = []
    for i, run in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        dash, mark = (("-", "o"), ("--", "s"), (":", "^"))[i // len(COLOURS) % 3]
        (seen, train), (looked, valid) = train_curve(run.metrics, x=key), valid_curve(run.metrics, x=key)
        curves += [(seen / scale, train), (looked / scale, valid)]
        axes.plot(*curves[-2], dash, color=colour, linewidth=0.8, alpha=0.6)
        axes.plot(*curves[-1], dash, color=colour, linewidth=2, marker=mark_of(valid, mark), markersize=4)
    fit_loss(axes, curves)
    name_curves(axes, [run.name for run in runs])
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    subtitle(axes, "thick: valid split; thin: training, smoothed over 2% of the run")
    return png(figure)


def _axis(x: str, *, longest: float) -> tuple[str, str, int]:
    """For the horizontal axis: its key in metrics.jsonl, its label, and the size of its unit."""
    if x == "seconds":
        unit, seconds = next((unit for unit in UNITS if longest >= 2 * unit[1]), UNITS[-1])
        return x, f"{unit} in steps", seconds
    return {"steps": ("step", "steps", 1), "tokens": ("tokens", "tokens seen", 1)}[x]


def name_curves(axes: Axes, names: Sequence[str]) -> None:
    """Add a legend for the thick curves, which are every second curve of the axes."""
    short = [name if len(name) <= 40 else f"...{name[-37:]}" for name in names]
    legend = axes.legend(axes.lines[1::2], short, loc="upper right", edgecolor="none", fontsize=9.5)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may have dollar signs


def _row(run: Curves) -> list[str]:
    last = run.metrics[-1]
    steps, valid = valid_curve(run.metrics, x="step")
    head = [run.name, f"{last['step']:,}", f"{last['tokens']:,}", f"{last['seconds']:,.0f}"]
    if not len(valid):
        return [*head, "-", "-", "-"]
    best = int(np.argmin(valid))
    return [*head, f"{valid[best]:.4f}", f"{steps[best]:,}", f"{valid[-1]:.4f}"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.compare",
        description="Curves of several runs in one picture, and their best in a table.",
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a NAME.run folder, a bundle, or a metrics.jsonl"
    )
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="the picture; default: %(default)s")
    parser.add_argument(
        "--x",
        choices=("tokens", "seconds", "steps"),
        default="tokens",
        help="the horizontal axis; default: %(default)s",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

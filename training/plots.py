"""The pictures of a bundle as PNG bytes: loss curves, spans of the heads, and attention on persistent vectors.

Colours are Okabe and Ito's, which colour-blind people can distinguish; the background is white on light and dark pages.
Knows no files. Matplotlib is used through its objects: no global state, no window.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from model.frozen.baked import BakedLM

Line = dict[str, Any]  # a line of metrics.jsonl, see training.record

BLUE, VERMILLION = "#0072B2", "#D55E00"
COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#24292F")
INK, FAINT, GRID = "#24292f", "#6e7781", "#e4e7eb"
WIDTH, DPI = 7.0, 200  # inches, dots per inch: 1400 pixels, sharp on a page that shows 700
PAD = 0.1  # inches of white around the picture
LABEL_SHARE = 0.075  # distance of two labels at the edge, as a share of the height of the picture
SMOOTHED_SHARE = 0.02  # the window of a smoothed curve, as a share of the run
START_SHARE = 0.08  # the start of the run, as a share of it, where the loss may be above the picture
SHARE_TOKENS = 4096  # tokens of the valid split over which attention is averaged
CHUNK_TOKENS = 256


def pictures(metrics: Sequence[Line], baked: BakedLM, valid_tokens: np.ndarray) -> dict[str, bytes]:
    """All pictures of a bundle by name, as PNG. There is no picture of the loss if no training step was recorded.

    Args:
        metrics: lines of `training.record.read_metrics`.
        valid_tokens: [n] integers of the valid split, n >= 1; the first 4096 are used.
    """
    tokens = valid_tokens[:SHARE_TOKENS]
    drawn = {
        "spans": draw_spans(baked.spans, max_span=baked.config.max_span, ramp=baked.config.span_ramp),
        "memory_share": draw_memory_share(memory_share(baked, tokens), num_tokens=len(tokens)),
    }
    return {"loss": draw_loss(metrics)} | drawn if any(line["kind"] == "train" for line in metrics) else drawn


def draw_loss(metrics: Sequence[Line]) -> bytes:
    """The picture of the loss in bits per byte over tokens: in training, smoothed, and at each validation."""
    figure, axes = canvas("Loss while training", height=3.9)
    tokens, smooth = train_curve(metrics, x="tokens")
    seen, valid = valid_curve(metrics, x="tokens")
    axes.plot(tokens, smooth, color=BLUE, linewidth=1.6)
    ends = [(float(smooth[-1]), f"train {smooth[-1]:.3f}", BLUE)]
    if len(valid):
        axes.plot(seen, valid, color=VERMILLION, linewidth=1.6, marker=mark_of(valid), markersize=3.4)
        ends.append((float(valid[-1]), f"valid {valid[-1]:.3f}", VERMILLION))
    fit_loss(axes, [(tokens, smooth), (seen, valid)])
    label_ends(axes, ends)
    subtitle(axes, f"train: mean over about {SMOOTHED_SHARE:.0%} of the run; valid: the part watched while training")
    axes.set_xlabel("tokens seen")
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    axes.set_ylabel("bits per byte")
    return png(figure)


def draw_spans(spans: Sequence[Sequence[int]], *, max_span: int, ramp: int) -> bytes:
    """The picture of the spans: for each layer, a dot for each head at the number of tokens that it looks back.

    Args:
        spans: for each layer, the reach of each head in tokens, ramp included.
        max_span: L, the largest possible reach; ramp: R, the smallest.
    """
    figure, axes = canvas("How far each head looks back", height=3.6)
    num_heads = len(spans[0])
    offsets = (np.arange(num_heads) - (num_heads - 1) / 2) * (0.6 / max(num_heads, 2))
    for layer, reaches in enumerate(spans):
        if layer % 2:
            axes.axvspan(layer - 0.5, layer + 0.5, color="#f4f6f8", linewidth=0, zorder=0)
        size = 46 if num_heads * len(spans) <= 64 else 16
        axes.scatter(layer + offsets, reaches, s=size, color=BLUE, alpha=0.85, linewidth=0, zorder=3)
        axes.hlines(np.median(reaches), layer - 0.36, layer + 0.36, color=VERMILLION, linewidth=2, zorder=2)
    axes.set_yscale("log", base=2)
    least, most = min(ramp, *map(min, spans)), max(max_span, *map(max, spans))
    axes.set_ylim(least / 1.25, most * 1.25)
    axes.yaxis.set_major_locator(FixedLocator([2.0**power for power in range(math.ceil(math.log2(least)), 40)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    layers_below(axes, len(spans))
    axes.set_ylabel("tokens (log scale)")
    subtitle(axes, f"each dot is a head, each bar the median of a layer; {max_span:,} tokens is the longest allowed")
    return png(figure)


def draw_memory_share(shares: Sequence[float], *, num_tokens: int) -> bytes:
    """The picture of the share of attention on persistent vectors: a bar for each layer.

    Args:
        shares: for each layer, 0 .. 1.
        num_tokens: number of positions over which the shares are means.
    """
    figure, axes = canvas("Attention on persistent vectors", height=3.3)
    axes.bar(range(len(shares)), shares, width=0.68, color=BLUE, zorder=3)
    if len(shares) <= 20:
        for layer, share in enumerate(shares):
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.text(layer, share + 0.035, f"{share:.0%}", ha="center", color=INK, fontsize=9, bbox=ground)
    axes.set_ylim(0, 1.08)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    layers_below(axes, len(shares))
    axes.set_ylabel("share of attention")
    subtitle(axes, f"the rest falls on the context; mean over heads and {num_tokens:,} tokens of the valid split")
    return png(figure)


def memory_share(baked: BakedLM, tokens: np.ndarray) -> list[float]:
    """For each layer, the share of attention on persistent vectors: mean over heads and over a fresh stream of tokens.

    Args:
        tokens: [n] integers, n >= 1.
    """
    cache = baked.allocate(1)
    total = torch.zeros(baked.config.num_layers, dtype=torch.float64)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        chunk = torch.from_numpy(tokens[start : start + CHUNK_TOKENS].astype(np.int64)).to(baked.device)
        _, new, shares = baked.extend_with_memory_share(chunk[None], cache, [0])
        cache.commit([0], new, [len(chunk)])
        total += shares[0].sum(0).double().cpu()
    means: list[float] = (total / len(tokens)).tolist()
    return means


def train_curve(metrics: Sequence[Line], *, x: str) -> tuple[np.ndarray, np.ndarray]:
    """The training loss: values of `x`, and bits per byte smoothed over 2 % of the run; both [number of lines]."""
    lines = [line for line in metrics if line["kind"] == "train"]
    weights = np.array([line["num_steps"] for line in lines], dtype=float)
    values = np.array([line["bits_per_byte"] for line in lines])
    return np.array([line[x] for line in lines]), smoothed(values, weights, steps=SMOOTHED_SHARE * weights.sum())


def valid_curve(metrics: Sequence[Line], *, x: str) -> tuple[np.ndarray, np.ndarray]:
    """The loss on the valid split: values of `x`, and bits per byte; both [number of validations]."""
    lines = [line for line in metrics if line["kind"] == "valid"]
    return np.array([line[x] for line in lines]), np.array([line["bits_per_byte"] for line in lines])


def smoothed(values: np.ndarray, weights: np.ndarray, *, steps: float) -> np.ndarray:
    """Exponential moving average over about the last `steps` steps; each value is the mean of `weight` steps.

    The average is without bias: it starts at the first value, not at zero.
    """
    result, total, mass = np.empty(len(values)), 0.0, 0.0
    for i, (value, weight) in enumerate(zip(values, weights, strict=True)):
        kept = math.exp(-weight / max(steps, 1e-9))
        total, mass = kept * total + (1 - kept) * value, kept * mass + (1 - kept)
        result[i] = total / mass
    return result


def canvas(title: str, *, height: float) -> tuple[Figure, Axes]:
    """An empty picture with a title in the style of all pictures."""
    figure = Figure(
        figsize=(WIDTH, height), dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=PAD, h_pad=PAD)
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=INK, fontsize=12.5, fontweight="bold", pad=12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=9.5, length=0, pad=5)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color=INK, fontsize=10)
    axes.yaxis.label.set(color=INK, fontsize=10)
    return figure, axes


def subtitle(axes: Axes, text: str) -> None:
    """Add a line of explanation below the title."""
    axes.set_title(axes.get_title(loc="left"), loc="left", color=INK, fontsize=12.5, fontweight="bold", pad=24)
    axes.annotate(text, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", color=FAINT, fontsize=9.5)


def mark_of(losses: np.ndarray, mark: str = "o") -> str | None:
    """The marker of a curve at each validation, or None if there are too many to distinguish the markers."""
    return mark if len(losses) <= 60 else None


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Label curves at the right edge at the height of their ends, moved apart if the labels would overlap.

    Args:
        ends: height, text and colour of each label. The limits of the axes must be final.
    """
    low, high = axes.get_ylim()
    least = LABEL_SHARE * (high - low)
    height = -math.inf
    for end, text, colour in sorted(ends):
        height = max(height + least, min(max(end, low), high))
        axes.annotate(
            text,
            (1, height),
            (6, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            annotation_clip=False,
            va="center",
            color=colour,
            fontsize=10,
            fontweight="bold",
        )


def fit_loss(axes: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Set the limits of the axes so that the differences of curves are visible, not their steep start."""
    curves = [(x, y) for x, y in curves if len(x)]
    end = max(float(x[-1]) for x, _ in curves)
    late = np.concatenate([y[x >= min(START_SHARE * end, x[-1] / 2)] for x, y in curves])
    late = late[np.isfinite(late)]
    low, high = (float(late.min()), float(late.max())) if len(late) else (0.0, 8.0)
    room = 0.08 * max(high - low, 0.02)
    axes.set_ylim(low - room, high + room)
    axes.set_xlim(0, end)


def layers_below(axes: Axes, num_layers: int) -> None:
    """Make the horizontal axis an axis of layers."""
    axes.set_xlim(-0.5, num_layers - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    axes.set_xlabel("layer")


def short_number(value: float, _: object = None) -> str:
    """A number with a unit, for example 12 M for 12,000,000."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def png(figure: Figure) -> bytes:
    """The picture as the bytes of a PNG file; equal pictures give equal bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()

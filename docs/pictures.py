"""docs/state.svg and docs/spans.svg, drawn from a bundle: `python -m docs.pictures [--bundle DIR] [--out DIR]`.

Both pictures show the model that ships. layer.svg and architecture.svg are drawn by hand. Every picture has colours for
a light and a dark page, and loads nothing from elsewhere. Sizes: H heads, D head size, L maximum span.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.bundle import Bundle, open_bundle
from model.spans import group_heads, reach_of_heads

BUNDLE, OUT = Path("bundles/default"), Path(__file__).parent
FLOAT32 = 4  # bytes
STYLE = """\
  text { fill: #1f2328; font-size: 13px; }
  .small { fill: #59636e; font-size: 12px; }
  .tiny { fill: #59636e; font-size: 10.5px; }
  .title { font-size: 15px; font-weight: 600; }
  .name { font-size: 14px; font-weight: 600; }
  .axis { stroke: #59636e; }
  .grid { stroke: #d1d9e0; }
  .ours { stroke: #0969da; } .ours-fill { fill: #0969da; }
  .gpt { stroke: #bc4c00; } .gpt-fill { fill: #bc4c00; }
  .ring { fill: #ddf4ff; stroke: #54aeff; }
  .line { fill: none; stroke-width: 2.5; }
  .dashed { stroke-dasharray: 6 5; }
  .dotted { stroke-dasharray: 2 4; stroke-width: 2; }
  @media (prefers-color-scheme: dark) {
   text { fill: #f0f6fc; }
   .small, .tiny { fill: #9198a1; }
   .axis { stroke: #9198a1; }
   .grid { stroke: #3d444d; }
   .ours { stroke: #4493f8; } .ours-fill { fill: #4493f8; }
   .gpt { stroke: #f0883e; } .gpt-fill { fill: #f0883e; }
   .ring { fill: #10233d; stroke: #1f6feb; }
  }"""
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Reaches:
    """How far the heads of a model look back, and the rings that its server keeps for them."""

    by_layer: Sequence[Sequence[int]]  # [layer][head], tokens
    slots: Sequence[Sequence[int]]  # [layer][head], slots of the head's ring, at least its reach
    head_size: int
    max_span: int

    @property
    def state_bytes(self) -> int:
        """Bytes of a stream in float32: a key and a value in every slot of every ring."""
        return 2 * FLOAT32 * self.head_size * sum(map(sum, self.slots))


@dataclass(frozen=True)
class Gpt:
    """The GPT of benchmarks/training.py: the width, heads and vocabulary of our model, and as many parameters."""

    num_layers: int
    width: int
    num_heads: int
    vocab_size: int
    context: int
    num_parameters: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token adds to the KV cache in float32."""
        return 2 * FLOAT32 * self.num_layers * self.width


def reaches_of(bundle: Bundle) -> Reaches:
    """The reaches of a bundle's heads, from the spans among its weights."""
    config, weights = bundle.config, bundle.tensors()
    by_layer, slots = [], []
    for layer in range(config.num_layers):
        reaches = reach_of_heads(weights[f"layers.{layer}.span"].tolist(), config=config)
        groups, order = group_heads(reaches, max_span=config.max_span)
        sizes = [group.num_slots for group in groups for _ in range(group.num_heads)]
        by_layer.append(reaches)
        slots.append([sizes[order.index(head)] for head in range(config.num_heads)])
    return Reaches(by_layer, slots, config.head_size, config.max_span)


def gpt_like(bundle: Bundle) -> Gpt:
    """A GPT with about as many parameters as the bundle's model; a test compares it with the benchmark's."""
    config = bundle.config
    width, block = config.width, 12 * config.width**2  # of one layer: attention 4 E^2, feed-forward 8 E^2
    outside = (2 * config.vocab_size + config.max_span) * width  # token tables in and out, table of positions
    num_layers = max(1, round((config.num_parameters - outside) / block))
    norms = (2 * num_layers + 1) * width
    total = outside + num_layers * block + norms
    return Gpt(num_layers, width, config.num_heads, config.vocab_size, config.max_span, total)


def draw_state(reaches: Reaches, gpt: Gpt, *, num_parameters: int) -> str:
    """Bytes of a stream's state over its length, beside the KV cache of the GPT. Both axes are logarithmic."""
    left, right, top, bottom = 76, 700, 74, 360
    most_tokens, least, most = 10**6, 10**4, 10**10

    def x(tokens: float) -> float:
        return left + (right - left) * math.log10(tokens) / math.log10(most_tokens)

    def y(num_bytes: float) -> float:
        return bottom - (bottom - top) * math.log(num_bytes / least) / math.log(most / least)

    ours, cost, window = reaches.state_bytes, gpt.bytes_per_token, gpt.context
    equal = ours / cost  # tokens of the GPT that take as many bytes
    parts = [
        '<text class="title" x="16" y="24">Bytes of one stream in float32, over its length in tokens</text>',
        f'<text class="small" x="16" y="44">GPT of {gpt.num_parameters / 1e6:.1f} M parameters: {gpt.num_layers} '
        f"layers, width {gpt.width}, {gpt.num_heads} heads, vocabulary {gpt.vocab_size:,}; its KV cache takes "
        f"{cost:,} bytes a token</text>",
    ]
    for power in range(4, 11):
        at = y(10**power)
        parts.append(f'<path class="grid" d="M{left} {at:.1f}H{right}"/>')
        parts.append(
            f'<text class="small" x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{_bytes(10**power)}</text>'
        )
    for power in range(7):
        at = x(10**power)
        parts.append(f'<path class="axis" d="M{at:.1f} {bottom}v5"/>')
        parts.append(
            f'<text class="small" x="{at:.1f}" y="{bottom + 20}" text-anchor="middle">{_count(10**power)}</text>'
        )
    parts += [
        f'<path class="axis" d="M{left} {bottom}H{right}"/>',
        f'<text class="small" x="{right}" y="{bottom + 40}" text-anchor="end">tokens in the stream (log scale)</text>',
        f'<path class="line gpt" d="M{x(least / cost):.1f} {y(least):.1f}L{x(window):.1f} {y(window * cost):.1f}"/>',
        f'<path class="line gpt dashed" d="M{x(window):.1f} {y(window * cost):.1f}'
        f'L{x(most_tokens):.1f} {y(most_tokens * cost):.1f}"/>',
        f'<path class="line gpt dotted" d="M{x(window):.1f} {y(window * cost):.1f}H{right}"/>',
        f'<path class="line ours" d="M{left} {y(ours):.1f}H{right}"/>',
        f'<circle class="gpt-fill" cx="{x(window):.1f}" cy="{y(window * cost):.1f}" r="4"/>',
        f'<circle class="ours-fill" cx="{x(equal):.1f}" cy="{y(ours):.1f}" r="4"/>',
    ]
    labels = [
        (right - 70, y(most_tokens * cost) + 20, "end", "name", f"GPT: {_bytes(most_tokens * cost)} at 1 M"),
        (x(26_000) - 8, y(26_000 * cost) - 8, "end", "small", "a GPT with a longer context"),
        (right, y(window * cost) - 5, "end", "small", f"a window of {window} tokens: {_bytes(window * cost)}"),
        (x(window) - 12, y(window * cost) - 3, "end", "small", f"the GPT's context, {window} tokens"),
        (right, y(ours) + 34, "end", "name", f"allattn: {_bytes(ours)} at any length"),
        (x(equal) + 6, y(ours) + 33, "start", "small", f"equal at {equal:.0f} tokens"),
        (x(24), y(30_000), "start", "small", "on shorter streams the GPT takes less"),
    ]
    parts += [
        f'<text class="{kind}" x="{across:.1f}" y="{down:.1f}" text-anchor="{anchor}">{words}</text>'
        for across, down, anchor, kind, words in labels
    ]
    told = (
        f"An all-attention model of {num_parameters / 1e6:.1f} M parameters keeps {ours:,} bytes for a stream of any "
        f"length; a GPT of as many parameters keeps {cost:,} bytes for each token"
    )
    return _document(parts, width=720, height=412, label=told)


def draw_spans(reaches: Reaches) -> str:
    """How far each head looks back, and the ring that is kept for it. The axis is linear."""
    left, right, top, bottom = 56, 700, 90, 296
    num_heads = len(reaches.by_layer[0])
    layer_width = (right - left) / len(reaches.by_layer)
    bar = (layer_width - 16) / num_heads

    def y(tokens: float) -> float:
        return bottom - (bottom - top) * tokens / reaches.max_span

    used, total = sum(map(sum, reaches.slots)), reaches.max_span * sum(map(len, reaches.slots))
    parts = [
        '<text class="title" x="16" y="24">How many tokens each head of bundles/default looks back</text>',
        f'<text class="small" x="16" y="44">{used:,} slots in all; {total:,} if every head looked back '
        f"{reaches.max_span} tokens</text>",
        f'<rect class="ours-fill" x="{right - 236}" y="34" width="12" height="12"/>',
        f'<text class="small" x="{right - 218}" y="44">span of the head</text>',
        f'<rect class="ring" x="{right - 110}" y="34" width="12" height="12"/>',
        f'<text class="small" x="{right - 92}" y="44">slots of its ring</text>',
    ]
    for tokens in range(0, reaches.max_span + 1, max(1, reaches.max_span // 4)):
        parts.append(f'<path class="grid" d="M{left} {y(tokens):.1f}H{right}"/>')
        parts.append(f'<text class="small" x="{left - 8}" y="{y(tokens) + 4:.1f}" text-anchor="end">{tokens}</text>')
    for layer, (spans, slots) in enumerate(zip(reaches.by_layer, reaches.slots, strict=True)):
        start = left + layer * layer_width + 8
        for head, (span, size) in enumerate(zip(spans, slots, strict=True)):
            x = start + head * bar
            parts.append(
                f'<rect class="ring" x="{x + 1:.1f}" y="{y(size):.1f}" width="{bar - 2:.1f}" '
                f'height="{bottom - y(size):.1f}"/>'
            )
            parts.append(
                f'<rect class="ours-fill" x="{x + 4:.1f}" y="{y(span):.1f}" width="{bar - 8:.1f}" '
                f'height="{bottom - y(span):.1f}"/>'
            )
            parts.append(
                f'<text class="tiny" x="{x + bar / 2:.1f}" y="{y(size) - 5:.1f}" text-anchor="middle">{span}</text>'
            )
        middle = start + num_heads * bar / 2
        parts.append(
            f'<text class="small" x="{middle:.1f}" y="{bottom + 18}" text-anchor="middle">layer {layer}</text>'
        )
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    parts.append('<text class="small" x="16" y="72">tokens</text>')
    return _document(parts, width=720, height=324, label="The span of each head of each layer, in tokens")


def pictures(folder: Path) -> Mapping[str, str]:
    """The text of each picture of a bundle, by the name of its file."""
    bundle = open_bundle(folder)
    reaches = reaches_of(bundle)
    state = draw_state(reaches, gpt_like(bundle), num_parameters=bundle.config.num_parameters)
    return {"state.svg": state, "spans.svg": draw_spans(reaches)}


def _document(parts: Sequence[str], *, width: int, height: int, label: str) -> str:
    return "\n".join(_lines(parts, width=width, height=height, label=label)) + "\n"


def _lines(parts: Sequence[str], *, width: int, height: int, label: str) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="{FONT}" role="img" aria-label="{label}">'
    )
    yield f" <style>\n{STYLE}\n </style>"
    yield from (f" {part}" for part in parts)
    yield "</svg>"


def _bytes(count: float) -> str:
    """`10 kB`, `1.87 MB`, `8.19 GB`: powers of 1000, three figures."""
    power = int(math.log10(count) // 3)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _count(count: int) -> str:
    """`100`, `10 k`, `1 M`."""
    power = int(math.log10(count) + 1e-9) // 3
    return f"{count // 1000**power} {('', 'k', 'M')[power]}".strip()


def main(argv: Sequence[str]) -> int:
    """Write both pictures; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m docs.pictures", description="Draw the model that ships.")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="the model to draw; default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of the pictures; default: docs/")
    arguments = parser.parse_args(argv)
    for name, text in pictures(arguments.bundle).items():
        (arguments.out / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

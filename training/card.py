"""The facts of a training run that a bundle stores: as data in config.json and as a README for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.bundle import PICTURE_SUFFIX, PLOTS
from model.config import ModelConfig
from model.frozen.baked import BakedLM
from training.evaluate import Evaluation
from training.loop import Run

PLACES: dict[str, Any] = {
    "out": True,
    "notes": True,
    "num_threads": True,
    "data": {"path", "cache_dir"},
}  # settings that concern one machine only; a bundle does not store them

CAPTIONS = {  # of the pictures that training.plots draws
    "loss": "Bits per byte over the tokens seen, in training and on the part of the valid split that was watched.",
    "spans": "How many tokens each head looks back, layer by layer.",
    "memory_share": "The share of attention on persistent vectors in each layer; the rest is on the context.",
}


def training_facts(run: Run, evaluations: dict[str, Evaluation], baked: BakedLM, *, data: str) -> dict[str, Any]:
    """The facts of a finished run on the corpus `data` as plain values, for config.json and `bundle_card`."""
    return {
        "data": data,
        "steps": run.step_count,
        "tokens_seen": run.tokens_seen,
        "epochs": round(run.streams.epochs, 3),
        "seconds": round(run.seconds, 1),
        "splits": {split: _figures(evaluation) for split, evaluation in evaluations.items()},
        "spans": baked.spans,
        "state_bytes": baked.allocate(1).bytes_per_row,
        "run": run.config.model_dump(mode="json", exclude=PLACES),
    }


def bundle_card(
    facts: dict[str, Any], baked: BakedLM, *, name: str, notes: Path | None, pictures: Sequence[str] = ()
) -> str:
    """The README of a bundle, in Markdown.

    Args:
        notes: a Markdown file whose text the README includes.
        pictures: names of the PNG files in the folder plots/ of the bundle.
    """
    shown = {picture: _picture(picture) for picture in pictures}
    config, splits = baked.config, facts["splits"]
    lengths = list(next(iter(splits.values()))["cold_bits_per_byte"])
    cold = [f"bits per byte, first {length} tokens of fresh streams" for length in lengths]
    head = ["split", "bits per byte", "nats per character", "perplexity per token", *cold]
    parts = [
        introduction(config, name=name),
        f"""Trained with `python -m training.run` on {facts["data"]}: {facts["steps"]:,} steps, {facts["tokens_seen"]:,}
tokens ({facts["epochs"]} epochs), {facts["seconds"]:,.0f} s in steps. Every setting is in config.json under
`training`.""",
        _table(head, [_row(split, figures) for split, figures in splits.items()]),
        *([shown.pop("loss")] if "loss" in shown else []),
        *([notes.read_text(encoding="utf-8").strip()] if notes else []),
        f"""A live stream costs {facts["state_bytes"]:,} bytes, whatever its length. How far each head looks back, in
tokens:""",
        _table(
            ["layer", "heads"], [[str(i), ", ".join(map(str, reaches))] for i, reaches in enumerate(facts["spans"])]
        ),
        *shown.values(),
    ]
    return "\n\n".join(parts) + "\n"


def introduction(config: ModelConfig, *, name: str) -> str:
    """The heading and the first paragraph of the README of any bundle, in Markdown."""
    return f"""# {name}

An all-attention language model (arXiv 1907.01470): no feed-forward layers; its heads attend to the context
and to learned persistent vectors. {config.num_parameters / 1e6:.2f} M parameters: {config.num_layers} layers, width
{config.width}, {config.num_heads} heads, {config.num_persistent} persistent vectors a head, spans of up to
{config.max_span} tokens, a vocabulary of {config.vocab_size}."""


def _picture(name: str) -> str:
    """A picture and its caption, in Markdown."""
    words = name.replace("_", " ")
    return f"![{words}]({PLOTS}/{name}{PICTURE_SUFFIX})\n\n{CAPTIONS.get(name, words)}"


def _row(split: str, figures: dict[str, Any]) -> list[str]:
    numbers = [figures["bits_per_byte"], figures["nats_per_char"], figures["perplexity"]]
    return [split, *(f"{number:.4f}" for number in (*numbers, *figures["cold_bits_per_byte"].values()))]


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    score = evaluation.score
    return {
        "num_tokens": score.num_tokens,
        "num_bytes": score.num_bytes,
        "bits_per_byte": score.bits_per_byte,
        "bits_per_token": score.bits_per_token,
        "nats_per_char": -score.logprob / score.num_chars,
        "perplexity": score.perplexity,
        "cold_bits_per_byte": {str(length): cold.bits_per_byte for length, cold in evaluation.cold.items()},
    }

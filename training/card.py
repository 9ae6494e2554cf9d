"""What a bundle says about itself: the facts of its training as data and, for people, as its README."""

from pathlib import Path
from typing import Any

from model.baked import BakedLM
from training.evaluate import Evaluation
from training.loop import Run


def training_facts(run: Run, evaluations: dict[str, Evaluation], baked: BakedLM) -> dict[str, Any]:
    """The facts of a finished run as plain values: what config.json keeps and `bundle_card` tells."""
    return {
        "data": run.config.data.name or str(run.config.data.path),
        "steps": run.step_count,
        "tokens_seen": run.tokens_seen,
        "epochs": round(run.streams.epochs, 3),
        "seconds": round(run.seconds, 1),
        "splits": {split: _figures(evaluation) for split, evaluation in evaluations.items()},
        "spans": baked.spans,
        "state_bytes": baked.allocate(1).bytes_per_row,
        "run": run.config.model_dump(mode="json", exclude={"out", "num_threads"}),
    }


def bundle_card(facts: dict[str, Any], baked: BakedLM, *, name: str, notes: Path | None) -> str:
    """The README of a bundle, in Markdown. `notes` is a file of one's own words that is put in."""
    config = baked.config
    rows = [
        f"| {split} | {figures['bits_per_byte']:.4f} | {figures['nats_per_char']:.4f} | {figures['perplexity']:.2f} | "
        + " | ".join(f"{bits:.4f}" for bits in figures["cold_bits_per_byte"].values())
        + " |"
        for split, figures in facts["splits"].items()
    ]
    lengths = list(next(iter(facts["splits"].values()))["cold_bits_per_byte"])
    head = ["split", "bits per byte", "nats per character", "perplexity per token"]
    head += [f"bits per byte, first {length} tokens of a fresh stream" for length in lengths]
    spans = [f"| {layer} | {', '.join(map(str, reaches))} |" for layer, reaches in enumerate(facts["spans"])]
    return "\n".join(
        [
            f"# {name}",
            "",
            "An all-attention language model (arXiv 1907.01470): no feed-forward layers, heads that attend to the context and",
            f"to learned persistent vectors. {config.num_parameters / 1e6:.2f} M parameters: {config.num_layers} layers, width "
            f"{config.width}, {config.num_heads} heads,",
            f"{config.num_persistent} persistent vectors a head, spans up to {config.max_span}, vocabulary "
            f"{config.vocab_size}. Trained with `python -m training.run`",
            f"on {facts['data']}: {facts['steps']:,} steps, {facts['tokens_seen']:,} tokens ({facts['epochs']} epochs), "
            f"{facts['seconds']:,.0f} s in steps.",
            "",
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
            *rows,
            "",
            *([notes.read_text(encoding="utf-8").rstrip(), ""] if notes else []),
            f"A live stream costs {facts['state_bytes']:,} bytes, whatever its length. How far each head looks back, in tokens:",
            "",
            "| layer | spans of its heads |",
            "|---|---|",
            *spans,
            "",
            "Every setting of the run is in config.json under `training`.",
            "",
        ]
    )


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

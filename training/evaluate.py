"""Evaluation of a model: the exact loss of a split in one pass, and the loss at the start of fresh streams.

Both use the baked model, which is the model that torch serves, and `model.scoring`, so /score returns the same.
`python -m training.evaluate BUNDLE --data NAME` prints the loss of a whole split, encoded by the bundle's tokenizer.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model.bundle import BundleError, open_bundle
from model.frozen.baked import BakedLM, load_baked
from model.frozen.served import score_document, score_positions
from model.scoring import RunningFigures, TextFigures
from model.tokenizer import BytesTokenizer, Tokenizer, encode_corpus
from training.config import DataConfig
from training.corpus import CorpusError, load_corpus
from training.progress import redraw_seconds

COLD_LENGTHS = (64, 256)  # tokens of a fresh stream
COLD_STREAMS = 64
COLD_BATCH = 8  # streams at a time: with long spans, the rings of all streams are gigabytes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Evaluation:
    """The scores of one split."""

    score: TextFigures  # of every token after the first, given all tokens before it
    cold: dict[int, TextFigures]  # for each n in COLD_LENGTHS, of the first n tokens of fresh streams


class EvaluationError(ValueError):
    """A split or a device that does not exist; the message says what exists."""


def main(argv: Sequence[str]) -> int:
    """TextFigures a split of a corpus with a bundle and print the figures; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        device = _device(args.device)
        bundle = open_bundle(args.bundle)
        tokens = read_split(args, bundle.tokenizer)
        model = load_baked(bundle, dtype=DTYPES[args.dtype], device=device)
        begun = time.monotonic()
        score = score_tokens(model, bundle.tokenizer, tokens, label=args.split)
        seconds = time.monotonic() - begun
    except (BundleError, CorpusError, EvaluationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    head = {"bundle": str(args.bundle), "data": args.data or str(args.path), "split": args.split}
    facts = {**head, **figures(score), "dtype": args.dtype, "seconds": round(seconds, 1)}
    print(json.dumps(facts) if args.json else _as_text(facts))
    return 0


def evaluate(model: BakedLM, tokenizer: Tokenizer, tokens: np.ndarray, *, label: str = "evaluate") -> Evaluation:
    """TextFigures a whole split.

    Args:
        tokens: [n] integers, n >= 2.
        label: the label of the progress bar.
    """
    score = score_tokens(model, tokenizer, tokens, label=label)
    return Evaluation(score, cold_start(model, tokenizer, tokens))


def score_tokens(model: BakedLM, tokenizer: Tokenizer, tokens: np.ndarray, *, label: str = "score") -> TextFigures:
    """The exact score of tokens[1:], each given all tokens before it, in one pass with constant memory."""
    tally, pause = RunningFigures(tokenizer), redraw_seconds()
    with tqdm(
        total=len(tokens) - 1, desc=label, unit="tok", unit_scale=True, mininterval=pause, maxinterval=pause
    ) as bar:
        for logprobs, _ in score_document(model, tokens):
            start = 1 + tally.score.num_tokens
            tally.add(tokens[start : start + len(logprobs)].tolist(), logprobs.tolist())
            bar.update(len(logprobs))
    return tally.score


def cold_start(
    model: BakedLM, tokenizer: Tokenizer, tokens: np.ndarray, *, lengths: Sequence[int] = COLD_LENGTHS
) -> dict[int, TextFigures]:
    """Scores of the first tokens of fresh streams that begin at evenly spaced positions of a split.

    Returns:
        for each length in `lengths` that is shorter than the split, the score of that many tokens of all streams.
    """
    lengths = [length for length in lengths if length < len(tokens)]
    if not lengths:
        return {}
    longest = max(lengths)
    starts = np.linspace(0, len(tokens) - longest - 1, COLD_STREAMS).astype(np.int64)
    windows = np.stack([tokens[start : start + longest + 1] for start in starts]).astype(np.int64)
    logprobs = np.concatenate(
        [_score_fresh(model, windows[first : first + COLD_BATCH]) for first in range(0, COLD_STREAMS, COLD_BATCH)]
    )
    return {
        length: TextFigures.of(
            tokenizer, windows[:, 1 : length + 1].ravel().tolist(), logprobs[:, :length].ravel().tolist()
        )
        for length in lengths
    }


def _score_fresh(model: BakedLM, windows: np.ndarray) -> np.ndarray:
    """Log-probabilities of all tokens of fresh streams except the first, [B, T + 1] -> [B, T]."""
    batch, rows = torch.from_numpy(windows).to(model.device), range(len(windows))
    hidden, _ = model.extend(batch[:, :-1], model.allocate(len(windows)), rows)
    logprobs: np.ndarray = (
        torch.stack([score_positions(model, hidden[row], batch[row, 1:]).logprobs for row in rows]).cpu().numpy()
    )
    return logprobs


def read_split(args: argparse.Namespace, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of the split that the command line names, [n] integers.

    Raises:
        CorpusError: see `load_corpus`.
        EvaluationError: the corpus lacks the split, the tokenizer cannot encode it, or it has fewer than 2 tokens.
    """
    corpus = load_corpus(DataConfig(name=args.data, path=args.path, cache_dir=args.cache_dir, batch=1, block=1))
    text: bytes | None = getattr(corpus, args.split)
    if text is None:
        raise EvaluationError(f"{corpus.name} has no {args.split} split; it has train and valid")
    tokens = _encode(text, tokenizer)
    if len(tokens) < 2:
        raise EvaluationError(
            f"the {args.split} split of {corpus.name} has {len(tokens)} tokens; at least 2 are needed"
        )
    return tokens


def figures(score: TextFigures) -> dict[str, Any]:
    """A score in every unit, as plain values for JSON."""
    return {
        "bits_per_char": score.bits_per_char,
        "bits_per_byte": score.bits_per_byte,
        "bits_per_token": score.bits_per_token,
        "perplexity": score.perplexity,
        "word_perplexity": score.word_perplexity,
        "logprob": score.logprob,
        "num_tokens": score.num_tokens,
        "num_bytes": score.num_bytes,
        "num_chars": score.num_chars,
        "num_words": score.num_words,
    }


def _encode(text: bytes, tokenizer: Tokenizer) -> np.ndarray:
    if isinstance(tokenizer, BytesTokenizer):
        return np.frombuffer(text, np.uint8)
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"byte {error.start} of the split is not UTF-8, and a {tokenizer.kind} tokenizer reads nothing else"
        ) from error
    pause = redraw_seconds()
    with tqdm(
        total=len(decoded), desc="encode", unit="char", unit_scale=True, mininterval=pause, maxinterval=pause
    ) as bar:
        return encode_corpus(tokenizer, decoded, progress=bar.update)


def _device(name: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise EvaluationError("--device cuda, but torch sees no CUDA device; allowed here: auto, cpu")
    return torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)


def _as_text(facts: dict[str, Any]) -> str:
    names = {
        "bits_per_char": "bits per character",
        "bits_per_byte": "bits per byte",
        "perplexity": "perplexity per token",
        "word_perplexity": "perplexity per word",
    }
    head = (
        f"{facts['bundle']} on the {facts['split']} split of {facts['data']}, {facts['dtype']}: "
        f"{facts['num_tokens']:,} tokens in {facts['seconds']:,.1f} s"
    )
    lines = [f"  {name:20}  {facts[key]:.4f}" for key, name in names.items() if facts[key] is not None]
    return "\n".join([head, *lines])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=sys.argv[0] if sys.argv[0].startswith("allattn ") else "python -m training.evaluate",
        description="The exact loss of a whole split in one pass: every token after the first, given all before it.",
    )
    parser.add_argument("bundle", type=Path, help="the folder of the model")
    parser.add_argument("--data", default="", metavar="NAME", help="a corpus by name, as data.name of a training run")
    parser.add_argument("--path", type=Path, help="the corpus: a file, or a folder of train.txt, valid.txt, test.txt")
    parser.add_argument("--split", choices=("test", "valid", "train"), default="test", help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of weights and state; default: float32"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )
    cache = DataConfig.model_fields["cache_dir"].default
    parser.add_argument("--cache-dir", type=Path, default=cache, help="where downloads are kept; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

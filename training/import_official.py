"""`python -m training.import_official checkpoint.pt OUT --vocab TRAIN.TXT`: import a checkpoint of the paper's code.

The code is github.com/facebookresearch/adaptive-span. Its checkpoints contain neither the meaning of the ids nor the
length of a span's ramp, so `--vocab` and `--span-ramp` give them. The bundle computes the same as that code, including
the zero vectors before a stream began (`empty_slots = "zero"`).
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from model.bundle import BundleError, save_bundle
from model.config import ModelConfig
from model.spans import reach_of_heads
from training.card import introduction
from training.official_checkpoint import OfficialCheckpointError, read_checkpoint
from training.official_vocabulary import (
    SYMBOLS,
    Symbols,
    Vocabulary,
    VocabularyError,
    byte_values,
    place_symbols,
    read_vocabulary,
)
from training.official_weights import convert

BYTES = "bytes"


def main(argv: list[str]) -> int:
    """Read a checkpoint and its vocabulary, and write the bundle; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        import_checkpoint(args)
    except (OfficialCheckpointError, VocabularyError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {args.out} cannot be written: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}; to serve it:\n  make serve BUNDLE={args.out}")
    return 0


def import_checkpoint(args: argparse.Namespace) -> None:
    """Write the bundle that the command line describes.

    Raises:
        OfficialCheckpointError, VocabularyError, BundleError: the checkpoint, the text or `out` cannot be used.
    """
    config, tensors = convert(
        read_checkpoint(args.checkpoint),
        span_ramp=args.span_ramp,
        dropout=args.dropout,
        embedding_dropout=args.embedding_dropout,
    )
    vocabulary = vocabulary_of(config, source=args.vocab, symbols=args.symbols)
    if config.embedding == "plain":
        tensors = place_symbols(tensors, vocabulary)
        config = ModelConfig(**(config.model_dump() | {"vocab_size": vocabulary.tokenizer.vocab_size}))
    facts = import_facts(args.checkpoint, config, tensors, vocabulary, source=args.vocab)
    save_bundle(
        args.out,
        config=config,
        tokenizer=vocabulary.tokenizer,
        tensors={name: tensor.numpy() for name, tensor in tensors.items()},
        card=import_card(facts, config, name=args.out.resolve().name),
        training=facts,
    )


def vocabulary_of(config: ModelConfig, *, source: str, symbols: Symbols | None = None) -> Vocabulary:
    """The vocabulary of a checkpoint of this configuration.

    Args:
        source: "bytes", or the path of the train.txt that the model was trained on.
        symbols: the kind of tokens in that text; None infers it from the text.

    Raises:
        VocabularyError: the text does not belong to the checkpoint.
    """
    adaptive = config.embedding == "adaptive"
    if source == BYTES and symbols not in (None, BYTES):
        raise VocabularyError(f"--vocab bytes has no tokens that could be {symbols}; give the train.txt, or ./bytes")
    found = byte_values() if source == BYTES else read_vocabulary(Path(source), symbols=symbols, by_count=adaptive)
    if len(found.ids) != config.vocab_size:
        raise VocabularyError(
            f"--vocab {source} gives {len(found.ids)} symbols and the checkpoint has {config.vocab_size}; it must be "
            "the train.txt that the model was trained on, as it was then, or 'bytes' where ids are the 256 byte values"
        )
    if adaptive and found.symbols != "words":
        raise VocabularyError(
            f"--vocab {source} gives {found.symbols}, and adaptive embeddings are for words: their ids cannot become "
            "byte values; --symbols words takes the tokens of a text as words"
        )
    return found


def import_facts(
    checkpoint: Path, config: ModelConfig, tensors: dict[str, Tensor], vocabulary: Vocabulary, *, source: str
) -> dict[str, Any]:
    """The origin of the bundle as plain values, for config.json and `import_card`."""
    num_unused = vocabulary.tokenizer.vocab_size - len(set(vocabulary.ids) - {None})
    return {
        "imported_from": checkpoint.name,
        "sha256": _sha256(checkpoint),
        "vocabulary": {
            "source": BYTES if source == BYTES else Path(source).name,
            "sha256": None if source == BYTES else _sha256(Path(source)),
            "symbols": vocabulary.symbols,
            "num_symbols": len(vocabulary.ids),
            "num_unused_ids": num_unused,
            "eos": vocabulary.eos,
        },
        "span_ramp": config.span_ramp,
        "empty_slots": config.empty_slots,
        "spans": [
            reach_of_heads(tensors[f"layers.{i}.span"].tolist(), config=config) for i in range(config.num_layers)
        ],
    }


def import_card(facts: dict[str, Any], config: ModelConfig, *, name: str) -> str:
    """The README of the bundle, in Markdown."""
    vocabulary = facts["vocabulary"]
    unused = vocabulary["num_unused_ids"]
    parts = [
        introduction(config, name=name),
        f"""It was not trained with allattn: `python -m training.import_official` read it from a checkpoint of the
paper's own code, github.com/facebookresearch/adaptive-span, the file `{facts["imported_from"]}` with the sha256
`{facts["sha256"]}`. **Check the licence of the checkpoint** before you use or share this bundle: that code is under
CC-BY-NC, and so may be what was made with it.""",
        f"""Symbols: {vocabulary["num_symbols"]} {vocabulary["symbols"]}, from `{vocabulary["source"]}`. That code's
`<eos>` {vocabulary["eos"]}.{f" {unused} ids were never symbols: their probability is 0." if unused else ""}""",
        f"""`empty_slots = "zero"`: as in that code, zero vectors before the first token take a share of the attention.
The soft edge of a span, {facts["span_ramp"]} tokens, is not in a checkpoint; it was given at the import.""",
        "How far each head looks back, in tokens:",
        "\n".join(
            ["| layer | heads |", "| --- | --- |"]
            + [f"| {i} | {', '.join(map(str, reaches))} |" for i, reaches in enumerate(facts["spans"])]
        ),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.import_official",
        description="Turn a checkpoint of the paper's code (github.com/facebookresearch/adaptive-span) into a bundle.",
    )
    parser.add_argument("checkpoint", type=Path, help="what that code wrote with --checkpoint")
    parser.add_argument("out", type=Path, help="folder of the bundle; one that is there is replaced")
    parser.add_argument(
        "--vocab",
        required=True,
        metavar="TRAIN.TXT | bytes",
        help="the train.txt that the model was trained on, or the word bytes if ids are byte values",
    )
    parser.add_argument(
        "--symbols",
        choices=SYMBOLS,
        help="what the tokens of TRAIN.TXT are: bytes as decimal numbers (enwik8), letters with _ for the space "
        "(text8), or words; found out from the text where not given",
    )
    parser.add_argument(
        "--span-ramp", type=_positive, default=32, help="that code's --adapt-span-ramp (default: 32, as in the paper)"
    )
    for flag, what in ("--dropout", "attention"), ("--embedding-dropout", "embeddings"):
        parser.add_argument(
            flag, type=_share, default=0.0, help=f"on the {what}, noted for further training; serving has none"
        )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to below 1")
    return number


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Check that an artefact computes what its bundle computes: both run random ragged steps, then both score a text.

    python -m export.verify ARTEFACT BUNDLE [--text FILE] [--device cpu]

The reference is the bundle's baked model in float32, on the CPU. `export.run` verifies an artefact before it keeps it.
"""

import argparse
import codecs
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model.artefact import ArtefactError, open_artefact
from model.backends import LoadOptions
from model.bundle import Bundle, BundleError, open_bundle
from model.frozen.baked import BakedLM, load_baked
from model.frozen.exported import ExportedLM, load_exported
from model.frozen.served import ServedLM, score_document
from model.scoring import TextFigures
from model.tokenizer import Tokenizer, TokenizerError

TEXT = Path(__file__).parents[1] / "training" / "corpora" / "shakespeare.txt"
NUM_BYTES = 100_000  # of the text that is scored
NUM_ROWS = 5
NUM_STEPS = 60
LONGEST = 48  # most tokens of a row in one random step
# Largest difference of a logit that is allowed, by how weights are kept. For float32 it is rounding; the other bounds
# are at least twice the difference that was measured on the bundle that ships.
BOUNDS = {"float32": 1e-4, "float16": 0.1, "int8": 1.0, "int4": 16.0}


@dataclass(frozen=True)
class Verified:
    """The results of a verification; each difference is the largest absolute difference."""

    num_steps: int
    num_tokens: int  # read in the steps, by all rows
    logits_difference: float
    state_difference: float  # of new keys and values
    memory_share_difference: float
    text_bytes: int
    bits_per_byte: float  # of the artefact
    bits_per_byte_of_bundle: float

    def __str__(self) -> str:
        loss = self.bits_per_byte - self.bits_per_byte_of_bundle
        return (
            f"replay   {self.num_steps} ragged steps, {self.num_tokens:,} tokens: logits differ by at most "
            f"{self.logits_difference:.1e}, keys and values by {self.state_difference:.1e}\n"
            f"text     {self.text_bytes:,} bytes: {self.bits_per_byte:.5f} bits per byte, the bundle "
            f"{self.bits_per_byte_of_bundle:.5f} ({loss:+.5f})"
        )


class Replay:
    """Two models that read the same tokens, each with its own ring buffers."""

    def __init__(self, reference: BakedLM, exported: ExportedLM, text: np.ndarray, *, seed: int = 0) -> None:
        """text: [n] int64. Each row reads it from a random place and begins again at its end."""
        self._exported = exported
        self._models: tuple[ServedLM, ServedLM] = (reference, exported)
        self._caches = tuple(model.allocate(NUM_ROWS) for model in self._models)
        self._text = text
        self._random = np.random.default_rng(seed)
        self._place = self._random.integers(len(text), size=NUM_ROWS)
        self.num_tokens = 0
        self.logits_difference = self.state_difference = self.memory_share_difference = 0.0

    def fill(self, row: int) -> None:
        """Read more tokens than the longest ring holds, so that every slot is overwritten."""
        left = self._models[0].config.max_span + LONGEST
        while left > 0:
            self.extend([row], [min(left, 256)])
            left -= 256

    def step(self) -> None:
        """Make one random step: reset or move some rows, then decode one token or read many tokens in some rows."""
        for row in np.flatnonzero(self._random.random(NUM_ROWS) < 0.04):
            for cache in self._caches:
                cache.reset(int(row))
        if self._random.random() < 0.1:
            source, target = map(int, self._random.permutation(NUM_ROWS)[:2])
            for cache in self._caches:
                cache.move(source, target)
        rows = [int(row) for row in self._random.permutation(NUM_ROWS)[: self._random.integers(1, NUM_ROWS + 1)]]
        if self._random.random() < 0.5:
            self.decode(rows)
        else:
            self.extend(rows, [int(count) for count in self._random.integers(1, LONGEST, size=len(rows))])

    def decode(self, rows: Sequence[int]) -> None:
        """Decode one token in each of `rows`; other rows up to the highest are computed and dropped."""
        tokens = np.zeros(max(rows) + 1, dtype=np.int64)
        num_new = np.zeros(len(tokens), dtype=np.int64)
        for row in rows:
            tokens[row], num_new[row] = self._read(row, 1)[0], 1
        found = []
        for model, cache in zip(self._models, self._caches, strict=True):
            logits, new = model.decode(torch.from_numpy(tokens).to(model.device), cache)
            cache.commit(range(len(tokens)), new, num_new.tolist())
            found.append((logits, new))
        (logits, new), (ours, our_new) = found
        self.logits_difference = max(self.logits_difference, _difference(logits, ours))
        self._compare_state(new, our_new)

    def extend(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Read counts[i] tokens in rows[i]; compare the outputs of all of these tokens, but not of padding."""
        tokens = np.zeros((len(rows), max(counts)), dtype=np.int64)
        for line, row, count in zip(tokens, rows, counts, strict=True):
            line[:count] = self._read(row, count)
        real = torch.from_numpy(np.arange(max(counts)) < np.array(counts)[:, None])  # [B, T]
        ends = torch.tensor(counts).cumsum(0) - 1  # indices of the rows' last tokens among the real ones
        last = self._exported.last_logits(
            torch.from_numpy(tokens).to(self._exported.device), self._caches[1], rows, counts
        )
        found = []
        for model, cache in zip(self._models, self._caches, strict=True):
            fed = torch.from_numpy(tokens).to(model.device)
            hidden, new, share = model.extend_with_memory_share(fed, cache, rows)
            cache.commit(rows, new, counts)
            logits = model.logits(hidden.cpu()[real].to(model.device))
            found.append((logits, [pair.cpu()[real] for pair in new], share.cpu()[real]))
        (logits, new, share), (ours, our_new, our_share) = found
        gaps = _difference(logits, ours), _difference(logits.cpu()[ends], last)
        self.logits_difference = max(self.logits_difference, *gaps)
        self.memory_share_difference = max(self.memory_share_difference, _difference(share, our_share))
        self._compare_state(new, our_new)

    def _read(self, row: int, count: int) -> np.ndarray:
        place = self._place[row]
        self._place[row] += count
        self.num_tokens += count
        return np.take(self._text, np.arange(place, place + count), mode="wrap")

    def _compare_state(self, new: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]) -> None:
        differences = (_difference(left, right) for left, right in zip(new, ours, strict=True))
        self.state_difference = max(self.state_difference, *differences)


def verify(
    bundle: Bundle, exported: ExportedLM, *, weights: str, text: Path = TEXT, num_bytes: int = NUM_BYTES
) -> Verified:
    """Run the bundle's model and the artefact on the same tokens and compare their outputs.

    Args:
        weights: how the artefact keeps its weights, a key of BOUNDS; it decides which difference is allowed.

    Raises:
        ArtefactError: the outputs differ by more or are not finite, or the text cannot be read.
    """
    tokens = read_text(text, bundle.tokenizer, num_bytes=num_bytes)
    reference = load_baked(bundle)
    replay = Replay(reference, exported, tokens)
    replay.fill(0)
    for _ in tqdm(range(NUM_STEPS), desc="replay", unit="step", leave=False, disable=None):
        replay.step()
    bound = BOUNDS[weights]
    if not replay.logits_difference <= bound:
        raise ArtefactError(
            f"the artefact's logits differ from the bundle's by {replay.logits_difference:.2e}; "
            f"at most {bound:g} is allowed with weights in {weights}"
        )
    if weights == "float32" and not max(replay.state_difference, replay.memory_share_difference) <= bound:
        raise ArtefactError(
            f"the artefact's keys and values differ from the bundle's by {replay.state_difference:.2e}, its memory "
            f"share by {replay.memory_share_difference:.2e}; at most {bound:g} is allowed"
        )
    scores = [
        _score(model, bundle.tokenizer, tokens, label=label)
        for model, label in ((reference, "bundle"), (exported, "artefact"))
    ]
    return Verified(
        num_steps=NUM_STEPS,
        num_tokens=replay.num_tokens,
        logits_difference=replay.logits_difference,
        state_difference=replay.state_difference,
        memory_share_difference=replay.memory_share_difference,
        text_bytes=scores[0].num_bytes,
        bits_per_byte=scores[1].bits_per_byte or 0.0,
        bits_per_byte_of_bundle=scores[0].bits_per_byte or 0.0,
    )


def read_text(file: Path, tokenizer: Tokenizer, *, num_bytes: int) -> np.ndarray:
    """Return the tokens of the first `num_bytes` bytes of a text, [n] int64.

    Raises:
        ArtefactError: the file cannot be read, is not UTF-8, has characters that the tokenizer lacks, or is too short.
    """
    try:
        with file.open("rb") as source:
            raw = source.read(num_bytes)
        text = codecs.getincrementaldecoder("utf-8")().decode(
            raw, final=len(raw) < num_bytes
        )  # the text may end inside a character
        tokens = np.array(tokenizer.encode(text), dtype=np.int64)
    except (OSError, UnicodeDecodeError, TokenizerError) as error:
        raise ArtefactError(f"text {file} cannot be used: {error}; name another with --text") from error
    if len(tokens) < 2:
        raise ArtefactError(f"text {file} has {len(tokens)} tokens; at least 2 are needed")
    return tokens


def _score(model: ServedLM, tokenizer: Tokenizer, tokens: np.ndarray, *, label: str) -> TextFigures:
    logprobs: list[float] = []
    with tqdm(
        total=len(tokens) - 1, desc=f"score, {label}", unit="tok", unit_scale=True, leave=False, disable=None
    ) as bar:
        for some, _ in score_document(model, tokens):
            logprobs += some.tolist()
            bar.update(len(some))
    return TextFigures.of(tokenizer, tokens[1:].tolist(), logprobs)


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest absolute difference; infinite if a value is not finite, 0 if the tensors are empty."""
    gap = (left.cpu().float() - right.cpu().float()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return float(gap.max()) if gap.numel() else 0.0


def positive(text: str) -> int:
    """Return the positive integer that an argument of argparse spells."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def main(argv: Sequence[str]) -> int:
    """Verify one artefact; return the exit status: 0 if it computes what its bundle computes."""
    parser = argparse.ArgumentParser(prog="python -m export.verify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artefact", type=Path, help="the folder that export.run wrote")
    parser.add_argument("bundle", type=Path, help="the folder of the bundle that the artefact was made from")
    parser.add_argument("--text", type=Path, default=TEXT, help="UTF-8 file that both score; default: %(default)s")
    parser.add_argument(
        "--num-bytes", type=positive, default=NUM_BYTES, help="how many bytes of it to score; default: %(default)s"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the artefact runs")
    asked = parser.parse_args(argv)
    try:
        artefact, bundle = open_artefact(asked.artefact), open_bundle(asked.bundle)
        if artefact.manifest.model_hash != bundle.hash:
            raise ArtefactError(
                f"{asked.artefact} was made from the model {artefact.manifest.model_hash}, {asked.bundle} is "
                f"{bundle.hash}; verify it against the bundle that it was made from"
            )
        exported = load_exported(artefact, LoadOptions(device=asked.device))
        found = verify(bundle, exported, weights=artefact.manifest.weights, text=asked.text, num_bytes=asked.num_bytes)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

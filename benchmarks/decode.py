"""Measure a model's tokens per second at several batch sizes, beside what this machine's memory and arithmetic allow.

    python -m benchmarks.decode [--bundle DIR] [--dtype float32|bfloat16] [--batches 1 8 32] [--repeats 7] [--text FILE]
    python -m benchmarks.decode --backend native [--weights float32|bfloat16|int8|int4] [--native-variant NAME] ...

DIR is a bundle, an artefact or `paper`: the paper's 18-layer shape of 39 M parameters, random weights and spans of
up to 256 tokens. No HTTP: after a prompt of 64 tokens it measures the runner's `decode` with greedy draws; for the
native step this is one call that decodes, draws and commits. --text FILE adds the bits per byte of the file's first
100 kB. The last line of the output is JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.paper import PAPER, write_paper_bundle
from benchmarks.server_process import machine
from model.artefact import is_artefact, open_artefact
from model.bundle import open_bundle
from model.config import ModelConfig
from model.frozen.served import score_document
from model.sampling.params import SamplingParams
from model.scoring import TextFigures
from model.tokenizer import Tokenizer
from server.config import EngineOptions
from server.engine.runner import ModelRunner
from server.engine.sequence import Chunk, Draw

WEIGHTS = ("auto", "float32", "bfloat16", "int8", "int4")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT = 64
STEPS = 32  # of one measurement
GREEDY = SamplingParams()
BYTES_OF_WEIGHTS = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1 + 4 / 64, "int4": 0.5 + 4 / 64}  # with scales


def best(work: Callable[[], object], *, repeats: int = 5) -> float:
    """Return the seconds of the fastest of several runs."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """Return the bytes per second that memory gives, and the operations per second of a large matrix product."""
    buffer = torch.ones(1 << 26)
    bandwidth = buffer.nbytes / best(buffer.sum)
    side = 2048
    left, right = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    return bandwidth, 2 * side**3 / best(lambda: left @ right)


def int8_ceiling() -> float:
    """Return the operations per second of a large product of int8 matrices."""
    side = 2048
    left, right = (torch.randint(-9, 9, (side, side), dtype=torch.int8) for _ in range(2))
    return 2 * side**3 / best(lambda: torch._int_mm(left, right))


def decode_rate(runner: ModelRunner, *, repeats: int) -> float:
    """Return the median tokens per second of all rows together."""
    batch = runner.num_rows
    tokens = np.arange(PROMPT, dtype=np.int32)
    for row in range(batch):
        runner.reset(row)
    runner.extend([Chunk(row, tokens) for row in range(batch)])
    rows, last, position = list(range(batch)), [1] * batch, PROMPT
    rates = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        for _ in range(STEPS):
            drawn = runner.decode(rows, last, [Draw(GREEDY, position, position - PROMPT)] * batch)
            last = [one.token for one in drawn]
            position += 1
        rates.append(batch * STEPS / (time.perf_counter() - begun))
    return statistics.median(rates[1:])


def possible_rate(runner: ModelRunner, config: ModelConfig, *, bandwidth: float, flops: float) -> float:
    """Return the tokens per second if only one read of weights and rings per step, or only arithmetic, took time."""
    layer = 4 * config.width**2 + 2 * config.num_persistent * config.width
    multiplied = config.num_layers * layer + config.width * config.vocab_size  # weights in products; adaptive: fewer
    batch = runner.num_rows
    state = runner.cache.bytes_per_row
    read = (multiplied * BYTES_OF_WEIGHTS[runner.model.weights] + batch * state) / bandwidth
    return batch / max(read, batch * 2 * multiplied / flops)


def bits_per_byte(runner: ModelRunner, tokenizer: Tokenizer, text: Path, *, num_bytes: int = 100_000) -> float:
    """Return the bits per byte of the beginning of a text, scored exactly."""
    tokens = np.array(tokenizer.encode(text.read_bytes()[:num_bytes].decode(errors="ignore")))
    logprobs: list[float] = []
    with tqdm(total=len(tokens) - 1, desc="score", unit="tok", unit_scale=True) as bar:
        for some, _ in score_document(runner.model, tokens):
            logprobs += some.tolist()
            bar.update(len(some))
    found = TextFigures.of(tokenizer, tokens[1:].tolist(), logprobs).bits_per_byte
    assert found is not None
    return found


def main() -> None:
    """Measure a model and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("bundles/default"), help="bundle, artefact, or `paper`")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype in which a bundle runs")
    parser.add_argument("--backend", choices=("auto", "torch", "native"), default="auto", help="what runs a bundle")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto", help="weights of the native step")
    parser.add_argument("--native-variant", default="auto", help="instruction set of the native step")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-invariant", choices=("true", "false"), default="true")
    parser.add_argument("--text", type=Path, help="file whose bits per byte are measured too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_paper_bundle(Path(folder) / PAPER) if str(args.bundle) == PAPER else args.bundle
        print(json.dumps({"benchmark": "decode", "model": str(args.bundle), **measure(bundle, args)}))


def measure(bundle: Path, args: argparse.Namespace) -> dict[str, object]:
    """Return all figures of one model."""
    described = open_artefact(bundle).bundle if is_artefact(bundle) else open_bundle(bundle)

    def load(batch: int) -> ModelRunner:
        return ModelRunner.load(
            EngineOptions(
                bundle=bundle,
                num_rows=batch,
                backend=args.backend,
                weights=args.weights,
                native_variant=args.native_variant,
                dtype=args.dtype,
                device="cpu",
                batch_invariant=args.batch_invariant == "true",
            )
        )

    runner = load(1)
    bandwidth, flops = ceilings(DTYPES.get(runner.model.weights, torch.float32))
    if runner.model.backend == "native" and runner.model.weights.startswith("int"):
        flops = int8_ceiling()
    rows = []
    for batch in tqdm(args.batches, desc="batch sizes"):
        runner = load(batch)
        achieved = decode_rate(runner, repeats=args.repeats)
        possible = possible_rate(runner, described.config, bandwidth=bandwidth, flops=flops)
        rows.append({"batch": batch, "tokens_per_s": round(achieved), "possible": round(possible)})
        rows[-1]["share"] = round(achieved / possible, 3)
    return {
        "backend": runner.model.backend,
        "variant": getattr(runner.model, "variant", None),
        "weights": runner.model.weights,
        "parameters": described.config.num_parameters,
        "dtype": str(runner.model.dtype).removeprefix("torch."),
        "state_bytes_per_row": runner.cache.bytes_per_row,
        "bits_per_byte": args.text and round(bits_per_byte(runner, described.tokenizer, args.text), 5),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "read_GB_per_s": round(bandwidth / 1e9, 1),
        "GFLOP_per_s": round(flops / 1e9),
        "batches": rows,
    }


if __name__ == "__main__":
    main()

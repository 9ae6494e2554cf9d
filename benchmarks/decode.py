"""Tokens per second of the baked step at several batch sizes, beside what this machine's memory and arithmetic allow.

    python -m benchmarks.decode [--bundle DIR | --paper] [--dtype float32|bfloat16] [--batches 1 8 32] [--repeats 7]

--paper takes the paper's 18-layer shape of 39 M parameters with random weights and spans of up to 256 tokens. No HTTP:
the runner's own `decode`, greedy, after a prompt of 64 tokens. The last line is JSON.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model.baked import BakedLM, bake
from model.config import ModelConfig
from model.network import AllAttentionLM
from server.messages import Sampling
from server.runner import DTYPES, ModelRunner
from server.sequence import Chunk, Draw

PROMPT = 64
STEPS = 32  # of one repetition
GREEDY = Sampling()


def paper_model(dtype: torch.dtype) -> BakedLM:
    """The paper's 18 layers with spans spread as trained ones are: most of them short, some long."""
    config = ModelConfig(vocab_size=256, num_layers=18, width=512, num_heads=8, num_persistent=1024, max_span=224)
    torch.manual_seed(0)
    network = AllAttentionLM(config)
    with torch.no_grad():
        for layer in network.layers:
            layer.span.copy_(torch.tensor([0.0, 0.0, 0.0, 0.1, 0.1, 0.3, 0.6, 1.0]))
    return bake(network, dtype=dtype)


def best(work: Callable[[], object], *, repeats: int = 5) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second that can be read, and operations per second of a large matrix product."""
    buffer = torch.ones(1 << 26)
    bandwidth = buffer.nbytes / best(buffer.sum)
    side = 2048
    left, right = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    return bandwidth, 2 * side**3 / best(lambda: left @ right)


def decode_rate(model: BakedLM, batch: int, *, repeats: int) -> float:
    """Median tokens per second of all rows together."""
    runner = ModelRunner(model, num_rows=batch)
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


def possible_rate(model: BakedLM, batch: int, *, bandwidth: float, flops: float) -> float:
    """Tokens per second if reading weights and rings once a step, or arithmetic, were all that costs time."""
    weights = sum(
        buffer.nbytes for name, buffer in model.named_buffers() if "tables" not in name and name != "embedding"
    )
    multiplied = weights / model.embedding.element_size()
    read = (weights + batch * model.allocate(1).bytes_per_row) / bandwidth
    return batch / max(read, batch * 2 * multiplied / flops)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("bundles/default"))
    parser.add_argument("--paper", action="store_true", help="the paper's 39 M shape with random weights instead")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    model = (
        paper_model(dtype) if args.paper else ModelRunner.load(args.bundle, num_rows=1, dtype=args.dtype).model
    )
    bandwidth, flops = ceilings(dtype)
    rows = []
    for batch in tqdm(args.batches, desc="batch sizes"):
        achieved = decode_rate(model, batch, repeats=args.repeats)
        possible = possible_rate(model, batch, bandwidth=bandwidth, flops=flops)
        rows.append({"batch": batch, "tokens_per_s": round(achieved), "possible": round(possible)})
        rows[-1]["share"] = round(achieved / possible, 3)
    result = {
        "benchmark": "decode",
        "model": "paper 18 layers, random" if args.paper else str(args.bundle),
        "parameters": model.config.num_parameters,
        "dtype": args.dtype,
        "state_bytes_per_row": model.allocate(1).bytes_per_row,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "read_GB_per_s": round(bandwidth / 1e9, 1),
        "GFLOP_per_s": round(flops / 1e9),
        "batches": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

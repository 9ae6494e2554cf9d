"""Measure how other clients slow a stream down: a long scored document, and ten times more clients than rows.

    python -m benchmarks.stall [--bundle DIR|paper] [--seconds 15] [--rounds 2] [--pause 0.25] [--set NAME=VALUE ...]

Each experiment starts a server and alternates windows without and with the disturbance. Metrics are over all windows of
a kind. The last line is JSON with the metrics and the goals.
"""

import argparse
import asyncio
import datetime
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from tqdm import tqdm

from benchmarks.client import Address, Reply, ask, encode_request
from benchmarks.load import SHAKESPEARE, Crowd, encode_generate, figures, flags_of, lengths_of, real_prompts, spread
from benchmarks.paper import PAPER, write_paper_bundle
from benchmarks.server_process import ServerProcess, machine

NUM_STREAMS = 16
DOCUMENT_BYTES = 500_000
SMALL = ["--num-rows", "8", "--max-waiting", "8"]  # so that 160 clients are ten times its capacity
CAPACITY, OVERLOAD = 16, 10
SETTLE_S = 1.0  # seconds between a change and the next window
GOALS = {"refusal_ms": 20, "p99_itl_with_score_over_without": 1.5, "overload_tokens_per_s_over_without": 0.95}

Disturbance = Callable[[], AbstractAsyncContextManager[Any]]
Window = tuple[float, float]


def generations(prompts: list[list[int]], *, num_short: int, num_tokens: int = 256) -> Iterator[bytes]:
    """An endless sequence of requests."""
    for i, length in enumerate(lengths_of(num_tokens, num_short=num_short)):
        yield encode_generate(prompts[i % len(prompts)], num_tokens=length)


async def alternate(disturb: Disturbance, *, args: argparse.Namespace, label: str) -> dict[str, list[Window]]:
    """Measure windows "without" and "with" the disturbance in turn."""
    windows: dict[str, list[Window]] = {"without": [], "with": []}
    for _ in tqdm(range(args.rounds), desc=label, unit="round"):
        windows["without"].append(await window(args.seconds))
        async with disturb():
            windows["with"].append(await window(args.seconds))
    return windows


async def window(seconds: float) -> Window:
    """Wait SETTLE_S, then measure a window: its start and its end."""
    await asyncio.sleep(SETTLE_S)
    start = time.perf_counter()
    await asyncio.sleep(seconds)
    return start, time.perf_counter()


def pooled(replies: Sequence[Reply], windows: Sequence[Window]) -> dict[str, Any]:
    """Inter-token latency and tokens per second over all windows of a kind."""
    stamps = [np.array(reply.times) for reply in replies]
    inside = [np.diff(times)[(times[1:] >= start) & (times[1:] < end)] for times in stamps for start, end in windows]
    rows = [figures(replies, start=start, end=end) for start, end in windows]
    rate = sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
    return {"tokens_per_s": round(rate, 1), "itl_ms": spread(np.concatenate([np.empty(0), *inside]))}


async def beside_a_document(address: Address, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """Measure 16 streams without and with a long document that is scored at the same time."""
    document = SHAKESPEARE.read_bytes()[:DOCUMENT_BYTES].decode(errors="ignore")
    request = encode_request("POST", "/score", body={"inputs": document})
    scored: list[Reply] = []

    async def score_on() -> None:
        while True:
            scored.append(await ask(address, request))

    @asynccontextmanager
    async def scoring() -> AsyncIterator[None]:
        task = asyncio.create_task(score_on())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    requests = generations(prompts, num_short=NUM_STREAMS)
    async with Crowd(address, requests=requests, size=NUM_STREAMS) as crowd:
        await crowd.until_busy(NUM_STREAMS)
        windows = await alternate(scoring, args=args, label="a document beside 16 streams")
        row = {name: pooled(crowd.replies, spans) for name, spans in windows.items()}
    failures = [reply.error or str(reply.status) for reply in scored if reply.error or reply.status != 200]
    ratio = row["with"]["itl_ms"]["p99"] / row["without"]["itl_ms"]["p99"]
    return {**row, "p99_itl_with_score_over_without": round(ratio, 3), "scored": len(scored), "score_errors": failures}


async def overload(address: Address, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """Measure as many clients as the server can hold, without and with nine times more clients."""
    replies: list[Reply] = []

    @asynccontextmanager
    async def others() -> AsyncIterator[None]:
        size = CAPACITY * (OVERLOAD - 1)
        crowd = Crowd(address, requests=generations(prompts, num_short=0), size=size, pause_s=args.pause)
        async with crowd:
            yield
        replies.extend(crowd.replies)

    requests = generations(prompts, num_short=CAPACITY)
    async with Crowd(address, requests=requests, size=CAPACITY, pause_s=args.pause) as crowd:
        await crowd.until_busy(8)
        windows = await alternate(others, args=args, label="ten times more clients")
        replies.extend(crowd.replies)
    row = {name: pooled(replies, spans) for name, spans in windows.items()}
    spans = windows["with"]
    refused = [reply for reply in replies if reply.status in (429, 503) and any(a <= reply.sent < b for a, b in spans)]
    seconds = np.array([reply.ended - reply.sent for reply in refused])
    bare = sum(b"retry-after" not in reply.headers for reply in refused)
    return {
        **row,
        "overload_tokens_per_s_over_without": round(row["with"]["tokens_per_s"] / row["without"]["tokens_per_s"], 3),
        "refusals": len(refused),
        "refusals_per_s": round(len(refused) / sum(end - start for start, end in spans), 1),
        "refusals_without_retry_after": bare,
        "refusal_ms": {**spread(seconds), "max": round(float(seconds.max()) * 1e3, 3) if len(refused) else None},
        "problems": sorted({reply.problem for reply in replies} - {"", "429", "503"}),
    }


def measure(bundle: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run both experiments, each with its own server."""
    prompts = real_prompts(bundle, text=SHAKESPEARE, num_tokens=64)
    flags = ["--bundle", str(bundle), *flags_of(args.set)]
    with ServerProcess(flags) as server:
        document = uvloop.run(beside_a_document(server.address, prompts, args))
    with ServerProcess([*flags, *SMALL]) as server:
        return {"document": document, "overload": uvloop.run(overload(server.address, prompts, args))}


def print_table(result: dict[str, Any]) -> None:
    """Print the results as a table."""
    print(f"{'':>28} {'tokens/s':>9} {'ITL ms p50':>11} {'p99':>9}")
    for name in ("document", "overload"):
        for kind in ("without", "with"):
            row = result[name][kind]
            itl = row["itl_ms"]
            print(f"{kind + ' ' + name:>28} {row['tokens_per_s']:>9} {itl['p50']:>11} {itl['p99']:>9}")
    print("refusals, ms:", result["overload"]["refusal_ms"], "of", result["overload"]["refusals"])


def main(argv: Sequence[str]) -> None:
    """Run the experiments and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", default="bundles/default", help=f"folder, or {PAPER}: 39 M random weights")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each window")
    parser.add_argument("--rounds", type=int, default=2, help="windows without and with the disturbance")
    parser.add_argument("--pause", type=float, default=0.25, help="seconds before a refused client comes again")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the server")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_paper_bundle(Path(folder) / PAPER) if args.bundle == PAPER else Path(args.bundle)
        result = measure(bundle, args)
    print_table(result)
    facts = {"benchmark": "stall", "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    settings = {name: getattr(args, name) for name in ("bundle", "seconds", "rounds", "pause", "set")}
    print(json.dumps({**facts, "machine": machine(), "settings": settings, "goals": GOALS, **result}))


if __name__ == "__main__":
    main(sys.argv[1:])

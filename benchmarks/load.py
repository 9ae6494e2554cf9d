"""Measure the HTTP API under load, closed or open loop, beside the engine alone with the same requests.

    python -m benchmarks.load [--bundle DIR|paper] [--concurrency 1 8 32 64] [--rate R] [--seconds 20] [--repeats N]

Closed loop: --concurrency clients, each of which sends a request as soon as the answer to the last request is whole.
Open loop (--rate): R requests per second arrive at random moments, however busy the server is. Prompts are parts of a
real text, sent as token ids. Every output has --output-tokens tokens, but the first of each client is shorter, so
that the clients do not all end at once. Each figure is of a window that opens once all rows are busy. The engine alone
(in a process of its own) and the server run in turn, --repeats times; the figures are medians. The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import lzma
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
import uvloop
from tqdm import tqdm

from benchmarks.client import Address, Connection, Reply, ask, encode_request
from benchmarks.paper import PAPER, write_paper_bundle
from benchmarks.server_process import ROOT, Costs, ServerProcess, get_json, machine
from model.bundle import open_bundle

SHAKESPEARE = ROOT / "training/corpora/shakespeare.txt"
GOALS = {"share_of_engine": 0.85, "api_us_per_token": 30}  # at concurrency 32
NUM_PROMPTS = 512
WINDOW_BYTES = 64  # of text per token of a prompt, more than any tokenizer needs
WARM_UP_S = 2.0
BUSY_S = 120.0  # a server whose rows are not all busy by then has failed
Row = dict[str, Any]


def real_prompts(bundle: Path, *, text: Path, num_tokens: int, seed: int = 0) -> list[list[int]]:
    """Return token ids of random parts of a text; of a packed text only the last 5 %, the test split of classics8."""
    packed = text.suffix == ".xz"
    data = lzma.decompress(text.read_bytes()) if packed else text.read_bytes()
    data = data[len(data) * 19 // 20 :] if packed else data
    rng, size = np.random.default_rng(seed), num_tokens * WINDOW_BYTES
    starts = rng.integers(0, max(1, len(data) - size), NUM_PROMPTS).tolist()
    windows = [data[start : start + size].decode(errors="ignore") for start in starts]
    return [ids[1 : num_tokens + 1] for ids in open_bundle(bundle).tokenizer.encode_batch(windows)]


def encode_generate(prompt: Sequence[int], *, num_tokens: int) -> bytes:
    """Return a request for a stream of exactly `num_tokens` tokens."""
    parameters = {"max_new_tokens": num_tokens, "ignore_eos": True}
    return encode_request("POST", "/generate", body={"inputs": prompt, "parameters": parameters, "stream": True})


def lengths_of(num_tokens: int, *, num_short: int, seed: int = 0) -> Iterator[int]:
    """Yield output lengths without end; the first `num_short` lengths are random, the others `num_tokens`."""
    yield from np.random.default_rng(seed).integers(1, num_tokens + 1, num_short).tolist()
    while True:
        yield num_tokens


class Crowd:
    """Clients that send requests one after the other while the context lasts, with a pause after an error."""

    def __init__(self, address: Address, *, requests: Iterator[bytes], size: int, pause_s: float = 0.05) -> None:
        self.replies: list[Reply] = []  # in the order in which the requests were sent, unfinished answers too
        self._address = address
        self._requests = requests
        self._size = size
        self._pause_s = pause_s
        self._clients: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._clients = [asyncio.create_task(self._ask_on()) for _ in range(self._size)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def until_busy(self, num_rows: int) -> None:
        """Wait until `num_rows` streams, or as many as there are clients, have begun. Raises RuntimeError."""
        deadline = time.monotonic() + BUSY_S
        while sum(len(reply.times) > 0 for reply in self.replies) < min(num_rows, self._size):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no full load after {BUSY_S:.0f} s: {errors_of(self.replies)}")
            await asyncio.sleep(0.01)

    async def _ask_on(self) -> None:
        connection: Connection | None = None
        try:
            while True:
                reply = Reply()
                self.replies.append(reply)
                try:
                    if connection is None or not connection.is_open:
                        connection = await Connection.open(self._address)
                    await connection.exchange(next(self._requests), reply=reply)
                except OSError:
                    reply.error, reply.ended = "no connection", time.perf_counter()
                if reply.problem:
                    await asyncio.sleep(self._pause_s * np.random.uniform(0.5, 1.5))  # not all at once
        finally:
            if connection is not None:
                connection.leave()


def num_ended(replies: Sequence[Reply]) -> int:
    """Return the number of answers that have ended."""
    return sum(reply.ended > 0 for reply in replies)


def errors_of(replies: Sequence[Reply]) -> dict[str, int]:
    """Return the number of answers with each problem."""
    return dict(Counter(reply.problem for reply in replies if reply.problem))


def spread(seconds: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """Return the median and the 99th percentile in milliseconds."""
    if not len(seconds):
        return {"p50": None, "p99": None}
    return dict(zip(("p50", "p99"), np.round(np.percentile(seconds, (50, 99)) * 1e3, 3).tolist(), strict=True))


def figures(replies: Sequence[Reply], *, start: float, end: float) -> Row:
    """Return the rates and latencies of a window; each event counts in the window in which it arrived."""
    stamps = [np.array(reply.times) for reply in replies]
    everything = np.concatenate([np.empty(0), *stamps])
    gaps = [np.diff(times)[(times[1:] >= start) & (times[1:] < end)] for times in stamps]
    firsts = [reply.times[0] - reply.sent for reply in replies if reply.times and start <= reply.times[0] < end]
    ended = [reply for reply in replies if start <= reply.ended < end]
    num_tokens = int(((everything >= start) & (everything < end)).sum())
    return {
        "seconds": round(end - start, 3),
        "tokens": num_tokens,
        "tokens_per_s": round(num_tokens / (end - start), 1),
        "requests": len(ended),
        "ttft_ms": spread(firsts),
        "itl_ms": spread(np.concatenate([np.empty(0), *gaps])),
        "e2e_ms": spread([reply.ended - reply.sent for reply in ended if not reply.problem]),
        "errors": errors_of(ended),
    }


async def watch(done: Callable[[], float], *, total: float, unit: str, label: str) -> None:
    """Show progress until `done` returns `total`."""
    layout = "{desc}: {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]"
    with tqdm(total=total, desc=label, unit=unit, leave=False, bar_format=layout) as bar:
        while (now := done()) < total:
            bar.update(now - bar.n)
            await asyncio.sleep(0.1)


async def closed_level(server: "Target", prompts: list[list[int]], size: int, args: argparse.Namespace) -> Row:
    """Measure `size` clients that send requests all the time."""
    lengths = lengths_of(args.output_tokens, num_short=size)
    requests = (encode_generate(prompts[i % len(prompts)], num_tokens=n) for i, n in enumerate(lengths))
    async with Crowd(server.address, requests=requests, size=size) as crowd:
        await crowd.until_busy(server.num_rows)
        costs, start, label = Costs(server.pids), time.perf_counter(), f"HTTP, {size} clients"
        if args.requests:
            await watch(lambda: num_ended(crowd.replies), total=args.requests, unit="request", label=label)
        else:
            await watch(lambda: time.perf_counter() - start, total=args.seconds, unit="s", label=label)
        row = figures(crowd.replies, start=start, end=time.perf_counter())
        return {"concurrency": size, **row, **costs.per_token(row["tokens"])}


async def open_level(server: "Target", prompts: list[list[int]], args: argparse.Namespace) -> Row:
    """Measure Poisson arrivals; the window ends with the last answer, so that slow answers count too."""
    arrivals = np.cumsum(np.random.default_rng(0).exponential(1 / args.rate, NUM_PROMPTS * 1000))
    arrivals = arrivals[: args.requests] if args.requests else arrivals[arrivals < args.seconds]
    replies, tasks = [Reply() for _ in arrivals], []
    costs, start = Costs(server.pids), time.perf_counter()
    watcher = asyncio.create_task(
        watch(lambda: num_ended(replies), total=len(replies), unit="request", label="HTTP, open")
    )
    for i, arrival in enumerate(arrivals.tolist()):
        await asyncio.sleep(max(0.0, start + arrival - time.perf_counter()))
        request = encode_generate(prompts[i % len(prompts)], num_tokens=args.output_tokens)
        tasks.append(asyncio.create_task(ask(server.address, request, reply=replies[i], keep=False)))
    await asyncio.gather(*tasks, watcher)
    row = figures(replies, start=start, end=time.perf_counter())
    return {"rate": args.rate, **row, **costs.per_token(row["tokens"])}


class Target:
    """The address of a running server, with its number of rows and its process ids."""

    def __init__(self, address: Address, *, pid: int | None) -> None:
        """pid: of the server's API process if it runs on this machine."""
        health = get_json(address, "/health")
        self.address = address
        self.num_rows = health["rows"]["used"] + health["rows"]["free"]
        self.pids = {"api": pid, "engine": health["engine"]["pid"]} if pid else {}


@contextlib.contextmanager
def target(args: argparse.Namespace) -> Iterator[Target]:
    """Give the server at --url, or start a server and end it afterwards."""
    if args.url:
        parts = urlsplit(args.url)
        yield Target((parts.hostname or "127.0.0.1", parts.port or 80), pid=None)
        return
    with ServerProcess(["--bundle", str(args.bundle), *flags_of(args.set)]) as server:
        yield Target(server.address, pid=server.pid)


def flags_of(assignments: Sequence[str]) -> list[str]:
    """Turn each name=value into a flag of the server and its value."""
    pairs = [assignment.partition("=") for assignment in assignments]
    return [part for name, _, value in pairs for part in (f"--{name.replace('_', '-')}", value)]


async def http_levels(server: Target, prompts: list[list[int]], args: argparse.Namespace) -> list[Row]:
    """Measure every level of load once, after a warm-up."""
    warm_up = (encode_generate(prompts[0], num_tokens=args.output_tokens) for _ in iter(int, 1))
    async with Crowd(server.address, requests=warm_up, size=server.num_rows):
        await asyncio.sleep(WARM_UP_S)
    if args.rate:
        return [await open_level(server, prompts, args)]
    return [await closed_level(server, prompts, size, args) for size in args.concurrency]


def engine_levels(prompts: list[list[int]], args: argparse.Namespace) -> dict[str, float]:
    """Return the tokens per second of the engine class alone, by concurrency."""
    from server.config import load_settings
    from server.engine.engine import Engine
    from server.engine.runner import ModelRunner

    settings = load_settings(["--bundle", str(args.bundle), *flags_of(args.set)], environ={})
    runner = ModelRunner.load(settings)
    runner.warm_up()
    level = partial(engine_level, Engine(runner, settings), prompts, num_rows=settings.num_rows, args=args)
    return {str(size): level(size) for size in args.concurrency}


def engine_level(engine: Any, prompts: list[list[int]], size: int, *, num_rows: int, args: argparse.Namespace) -> float:
    """Return the tokens per second of `size` sequences at once; a new sequence follows each that ends."""
    from model.sampling.params import SamplingParams
    from server.protocol.messages import Generate

    lengths, names = lengths_of(args.output_tokens, num_short=size), iter(range(sys.maxsize))

    def submit() -> None:
        number = next(names)
        tokens = np.array(prompts[number % len(prompts)], "<i4").tobytes()
        engine.submit(Generate(f"{size}-{number}", tokens, SamplingParams(seed=0), next(lengths)))

    for _ in range(size):
        submit()
    begun, num_tokens, start = set(), 0, 0.0
    with tqdm(total=args.seconds, desc=f"engine, {size} sequences", unit="s", leave=False) as bar:
        while not start or bar.n < args.seconds:
            step = engine.step()
            for ended in step.ended:
                assert ended.finish_reason == "length", ended
                submit()
            if start:
                num_tokens += len(step.tokens)
                bar.update(time.perf_counter() - start - bar.n)
            else:
                begun |= {token.sequence for token in step.tokens}
                start = time.perf_counter() if len(begun) >= min(size, num_rows) else 0.0
    rate = num_tokens / (time.perf_counter() - start)
    engine.shutdown()
    return round(rate, 1)


def run_engine(argv: Sequence[str], bundle: Path) -> dict[str, float]:
    """Run `engine_levels` in a process of its own, so that the engine's memory is free when the server starts."""
    command = [sys.executable, "-m", "benchmarks.load", *argv, "--engine", "--bundle", str(bundle)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    levels: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return levels


def median_rows(rounds: Sequence[Sequence[Row]]) -> list[Row]:
    """Return the rows of several rounds as one: the median of each number, the sum of errors."""

    def merge(values: Sequence[Any], name: str = "") -> Any:
        if name == "errors":
            return dict(sum(map(Counter, values), Counter()))
        if isinstance(values[0], dict):
            return {key: merge([value[key] for value in values], key) for key in values[0]}
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    return [merge(rows) for rows in zip(*rounds, strict=True)]


def measure(args: argparse.Namespace, argv: Sequence[str]) -> list[Row]:
    """Measure the engine and the server in turn, --repeats times; return medians."""
    prompts = real_prompts(args.bundle, text=args.text, num_tokens=args.prompt_tokens)
    rounds = []
    for _ in range(args.repeats):
        alone = {} if args.url or args.rate else run_engine(argv, args.bundle)
        with target(args) as server:
            rows = uvloop.run(http_levels(server, prompts, args))
        for row in rows:
            if rate := alone.get(str(row.get("concurrency"))):
                row |= {"engine_tokens_per_s": rate, "share_of_engine": round(row["tokens_per_s"] / rate, 4)}
        rounds.append(rows)
    return median_rows(rounds)


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    print(f"{'load':>8} {'tokens/s':>9} {'of engine':>9} {'TTFT ms p50/p99':>18} {'ITL ms p50/p99':>18}", end="")
    print(f" {'CPU us/token API/engine/client':>31}  errors")
    for row in rows:
        pairs = [f"{row[name]['p50']}/{row[name]['p99']}" for name in ("ttft_ms", "itl_ms")]
        cpu = "/".join(str(row.get(f"{name}_us_per_token", "-")) for name in ("api", "engine", "client"))
        load = row["concurrency"] if "concurrency" in row else f"{row['rate']}/s"
        share = f"{row['share_of_engine']:.1%}" if "share_of_engine" in row else "-"
        print(f"{load:>8} {row['tokens_per_s']:>9} {share:>9} {pairs[0]:>18} {pairs[1]:>18} {cpu:>31}  {row['errors']}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", default="bundles/default", help=f"folder, or {PAPER}: 39 M random weights")
    parser.add_argument("--url", help="a running server to measure, in place of a new server")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rate", type=float, help="open loop: requests a second")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each window")
    parser.add_argument("--requests", type=int, help="end each window of the server after this many answers instead")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--text", type=Path, default=SHAKESPEARE, help="where prompts come from; .xz: classics8")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of server and engine")
    parser.add_argument("--engine", action="store_true", help="measure the engine alone, in this process")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Measure, then print a table and a line of JSON."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        name = args.bundle
        args.bundle = write_paper_bundle(Path(folder) / PAPER) if name == PAPER else Path(name)
        if args.engine:
            prompts = real_prompts(args.bundle, text=args.text, num_tokens=args.prompt_tokens)
            print(json.dumps(engine_levels(prompts, args)))
            return
        rows = measure(args, argv)
    settings = {
        key: getattr(args, key) for key in ("url", "prompt_tokens", "output_tokens", "seconds", "repeats", "set")
    }
    result = {
        "benchmark": "load",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "bundle": name,
        "settings": settings,
        "goals": GOALS,
        "rows": rows,
    }
    print_table(rows)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Soak test of a server under a random load: is a request lost, does a row leak, does memory grow?

    python -m benchmarks.soak --minutes 60 [--bundle DIR] [--seed N] [--kill-every SECONDS] [--out FILE]

A small server gets a random mixture of requests from clients that disconnect, read slowly, cancel, send bad requests
or come in bursts, while its engine is killed or stopped at random moments. Each request must end in a way that its kind
allows; any other ending is printed as LOST. The last line is JSON; the exit status is 1 if a check failed.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import math
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import uvloop
from tqdm import tqdm

from benchmarks.client import Address, Connection, Reply, ask, encode_request
from benchmarks.load import SHAKESPEARE, flags_of
from benchmarks.server_process import ServerProcess, get_json, is_alive, machine, resident_bytes

SMALL = flags_of(["num_rows=8", "max_waiting=16", "max_behind=64", "max_restarts=1000000"])
NUM_CLIENTS, BURST = 20, 60
ENDING_S, RECOVERY_S, QUIET_S = 180.0, 90.0, 10.0  # time limits: of a request, of a new engine, of the last rows
MAX_LOST = 200  # the test stops after so many problems
JUDGED_MINUTES = 5  # a shorter run does not judge memory, which still warms up
GROWTH, SLACK = 1.15, 20e6  # allowed median of the last fifth: this factor of the first fifth's, plus bytes
TEXT = SHAKESPEARE.read_text()
BAD: list[tuple[str, str, Any, int]] = [
    ("POST", "/generate", b"{", 400),
    ("POST", "/generate", b'{"inputs": "\xff"}', 400),
    ("POST", "/generate", {"inputs": "x", "parameters": {"temperature": 3}}, 422),
    ("POST", "/generate", {"inputs": "x", "parameter": {}}, 422),
    ("POST", "/generate", {"inputs": [2_000_000_000]}, 422),
    ("POST", "/score", {"inputs": 5}, 422),
    ("POST", "/nowhere", {}, 404),
    ("PUT", "/generate", {}, 405),
    ("DELETE", "/requests/nobody", None, 404),
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request, the actions of its client, and the endings that are allowed besides a refusal (429, 503)."""

    request: bytes
    kind: str = ""
    status: int = 200
    num_sequences: int = 0  # sequences that status 200 admits
    is_list: bool = False
    stream: bool = False
    timed: bool = False
    name: str = ""
    cancel_after: float | None = None
    actions: tuple[tuple[float, Literal["leave", "pause", "resume"]], ...] = ()  # seconds after the request is sent

    @property
    def is_slow(self) -> bool:
        """Whether the client stops reading for a while."""
        return len(self.actions) > 1


def draw_cases(rng: random.Random) -> list[Case]:
    """The next case of a client at random; for a burst several cases that run at the same time."""
    kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    drawn = KINDS[kind][1](rng)
    return [replace(case, kind=kind) for case in (drawn if isinstance(drawn, list) else [drawn])]


def _text(rng: random.Random, size: int) -> str:
    start = rng.randrange(len(TEXT) - size)
    return TEXT[start : start + size]


def _generate(rng: random.Random, **fixed: Any) -> Case:
    """A random generation. fixed: given values of inputs, stream, timeout_s and parameters."""
    parameters: dict[str, Any] = {"max_new_tokens": rng.choice((1, 8, 32, 100))}
    if rng.random() < 0.6:
        parameters |= {"temperature": round(rng.uniform(0.1, 2), 2), "seed": rng.getrandbits(53)}
        parameters |= rng.choice(({}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"typical_p": 0.9}))
    parameters |= rng.choice(({}, {"stop": ["the", "\n\n"]}, {"repetition_penalty": 1.3}, {"truncate": 20}))
    body: dict[str, Any] = {"inputs": _text(rng, rng.choice((5, 100, 3000))), "stream": rng.random() < 0.6}
    for field, value in fixed.items():
        (body if field in ("inputs", "stream", "timeout_s") else parameters)[field] = value
    name = f"soak-{rng.getrandbits(64):016x}"
    many = isinstance(body["inputs"], list)
    return Case(
        request=encode_request("POST", "/generate", body={**body, "parameters": parameters}, name=name),
        num_sequences=(len(body["inputs"]) if many else 1) * parameters.get("n", 1),
        is_list=many or parameters.get("n", 1) > 1,
        stream=body["stream"],
        timed="timeout_s" in body,
        name=name,
    )


def _score(rng: random.Random, size: int) -> Case:
    return Case(request=encode_request("POST", "/score", body={"inputs": _text(rng, size)}), num_sequences=1)


def _leaver(rng: random.Random) -> Case:
    """A request whose client disconnects: after half a request, at once, or later."""
    case = _score(rng, 20_000) if rng.random() < 0.2 else _generate(rng, max_new_tokens=500, ignore_eos=True)
    if rng.random() < 0.2:
        half = case.request[: rng.randrange(1, len(case.request))]
        return replace(case, request=half, num_sequences=0, actions=((rng.uniform(0, 0.5), "leave"),))
    return replace(case, actions=((rng.choice((0.0, rng.uniform(0, 0.05), rng.uniform(0, 3))), "leave"),))


def _slow(rng: random.Random) -> Case:
    start, case = rng.uniform(0, 1), _generate(rng, max_new_tokens=600, stream=True)
    return replace(case, actions=((start, "pause"), (start + rng.uniform(1, 8), "resume")))


def _bad(rng: random.Random) -> Case:
    method, path, body, status = rng.choice(BAD)
    return Case(request=encode_request(method, path, body=body), status=status)


KINDS: dict[str, tuple[float, Callable[[random.Random], Case | list[Case]]]] = {
    "generate": (30, _generate),
    "list": (6, lambda rng: _generate(rng, inputs=[_text(rng, 50) for _ in range(rng.randint(2, 4))])),
    "several": (6, lambda rng: _generate(rng, n=rng.randint(2, 4), do_sample=True, temperature=0.9)),
    "score": (8, lambda rng: _score(rng, rng.choice((50, 2000)))),
    "document": (0.7, lambda rng: _score(rng, 200_000)),
    "bad": (8, _bad),
    "cancel": (6, lambda rng: replace(_generate(rng, max_new_tokens=2000), cancel_after=rng.uniform(0, 1))),
    "leave": (14, _leaver),
    "slow": (3, _slow),
    "timeout": (6, lambda rng: _generate(rng, max_new_tokens=3000, timeout_s=rng.choice((0.001, 0.1, 1.0)))),
    "burst": (0.5, lambda rng: [_generate(rng, max_new_tokens=8) for _ in range(BURST)]),
}


def judge(case: Case, reply: Reply, *, outage: bool) -> str:
    """The name of an ending; it begins with "lost" if the case does not allow it. outage: the engine was killed."""
    if reply.error:
        allowed = {"left": bool(case.actions) and not case.is_slow, "cut off": case.is_slow}
        return reply.error if allowed.get(reply.error) else f"lost: {reply.error}, status {reply.status}"
    try:
        if reply.status != 200 or case.status != 200:
            return _judge_error(case, reply, outage=outage)
        if case.stream:
            return _judge_stream(case, reply.events(), outage=outage)
        return _judge_plain(case, json.loads(reply.body))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"lost: malformed, {error!r}"


def _judge_error(case: Case, reply: Reply, *, outage: bool) -> str:
    code = json.loads(reply.body)["error"]["code"]
    if reply.status == case.status:
        return "rejected"
    if case.timed and reply.status == 408:
        return "timeout"
    if case.cancel_after is not None and reply.status == 499:
        return "cancelled"
    if outage and reply.status >= 500:
        return "engine error"
    if reply.status == 429 and b"retry-after" in reply.headers and b"retry-after-ms" in reply.headers:
        return "refused"
    return f"lost: status {reply.status}, {code}"


def _judge_stream(case: Case, events: list[dict[str, Any]], *, outage: bool) -> str:
    if not events:
        return "lost: no event"
    if "error" in events[-1]:
        code = events[-1]["error"]["code"]
        if case.is_slow or (case.timed and code == "timeout"):
            return "cut off" if case.is_slow else code
        return "engine error" if outage else f"lost: error event, {code}"
    texts, reasons = defaultdict[int, str](str), dict[int, str]()
    for event in events:
        number = event.get("sequence", 0)
        if number in reasons:
            return "lost: an event after the ending"
        texts[number] += event["token"]["text"] if event["token"] else ""
        if event["details"] is not None:
            reasons[number] = event["details"]["finish_reason"]
            held_back_from = None if event["token"] else len(texts[number])  # it is told, but in no token
            if texts[number] != event["generated_text"][:held_back_from]:
                return "lost: the events' texts are not the generated text"
    if len(reasons) != case.num_sequences:
        return f"lost: {len(reasons)} endings of {case.num_sequences}"
    return _ending_of(case, set(reasons.values()))


def _ending_of(case: Case, reasons: set[str]) -> str:
    for reason, allowed in (("cancelled", case.cancel_after is not None), ("timeout", case.timed)):
        if reason in reasons:
            return reason if allowed else f"lost: {reason} though nobody asked"
    return f"lost: {reasons}" if reasons - {"length", "eos_token", "stop_sequence"} else "answered"


def _judge_plain(case: Case, body: Any) -> str:
    if case.is_list != isinstance(body, list) or (case.is_list and len(body) != case.num_sequences):
        return "lost: not as many answers as asked for"
    for answer in body if case.is_list else [body]:
        answer["logprob" if "logprob" in answer else "generated_text"]  # KeyError if neither key is there
    return "answered"


class Soak:
    """One soak test: its clients, its kills of the engine, and its counts."""

    def __init__(self, server: ServerProcess, args: argparse.Namespace) -> None:
        self.address: Address = server.address
        self.pid = server.pid
        self.endings: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []
        self.num_admitted = self.num_maybe = 0  # sequences that were admitted; that may have been admitted
        self.outages: list[list[float]] = []
        self.samples: list[tuple[int, int | None, int | None]] = []  # bytes of API; pid, bytes of engine
        self._args = args
        self._rng = random.Random(args.seed)
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Run the clients until the time is over and the last request has ended."""
        clients = [self._client(random.Random(f"{self._args.seed}-{i}")) for i in range(NUM_CLIENTS)]
        await asyncio.gather(self._watch(), self._kill_engines(), *clients)
        if not await self._becomes(lambda health: health["rows"]["used"] == health["queue"]["requests"] == 0, QUIET_S):
            self._report(f"not quiet at the end: {await self._health()}")

    async def _client(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            await asyncio.gather(*map(self._serve, draw_cases(rng)))
            await asyncio.sleep(rng.expovariate(20))

    async def _serve(self, case: Case) -> None:
        """Send the request of a case, and count and judge its ending."""
        reply, later = Reply(sent=time.perf_counter()), asyncio.get_running_loop().call_later
        canceller = asyncio.create_task(self._cancel(case))
        try:
            connection = await Connection.open(self.address, receive_buffer=4096 if case.is_slow else None)
            timers = [later(after, getattr(connection, action)) for after, action in case.actions]
            await connection.exchange(case.request, reply=reply, keep=True, timeout_s=ENDING_S)
            for timer in timers:
                timer.cancel()
            connection.leave()
        except OSError:
            reply.error, reply.ended = "no connection", time.perf_counter()
        await canceller
        ending = judge(case, reply, outage=any(a < reply.ended and reply.sent < b for a, b in self.outages))
        self.endings[case.kind, ending.partition(":")[0]] += 1
        if reply.status == 200:
            self.num_admitted += case.num_sequences
        elif ending not in ("refused", "rejected"):
            self.num_maybe += case.num_sequences
        if ending.startswith("lost"):
            self._report(f"{case.kind} {case.name} {ending}")

    async def _cancel(self, case: Case) -> None:
        if case.cancel_after is None:
            return
        await asyncio.sleep(case.cancel_after)
        reply = await ask(self.address, encode_request("DELETE", f"/requests/{case.name}"), timeout_s=ENDING_S)
        if reply.error or reply.status not in (200, 404):
            self._report(f"DELETE {case.name}: {reply.error or reply.status}")

    async def _kill_engines(self) -> None:
        """Kill the engine at random moments; every fourth time stop it instead, which looks like a hang."""
        while self._args.kill_every:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), self._args.kill_every * self._rng.uniform(0.7, 1.3))
            if self._stop.is_set():
                return
            outage = [time.perf_counter(), math.inf]
            self.outages.append(outage)
            pid = (await self._health())["engine"]["pid"]
            os.kill(pid, signal.SIGKILL if len(self.outages) % 4 else signal.SIGSTOP)
            if not await self._becomes(
                lambda h, old=pid: h["state"] == "ready" and h["engine"]["pid"] != old, RECOVERY_S
            ):
                self._report(f"no new engine within {RECOVERY_S:.0f} s of the end of {pid}")
            outage[1] = time.perf_counter()

    async def _becomes(self, condition: Callable[[dict[str, Any]], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition(await self._health()):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.1)
        return True

    async def _health(self) -> dict[str, Any]:
        """The reply of /health; raises OSError if the API process does not answer."""
        health: dict[str, Any] = await asyncio.to_thread(get_json, self.address, "/health")
        return health

    async def _watch(self) -> None:
        """Show progress and sample memory until the time is over or too many problems occurred."""
        total = self._args.minutes * 60
        every, start = min(10.0, total / 40), time.monotonic()
        with tqdm(total=round(total), unit="s", bar_format="{percentage:3.0f}% {elapsed}<{remaining} {postfix}") as bar:
            while (now := time.monotonic() - start) < total and len(self.problems) < MAX_LOST:
                bar.update(now - bar.n)
                bar.set_postfix(requests=self.endings.total(), kills=len(self.outages), wrong=len(self.problems))
                try:
                    engine = (await self._health())["engine"]["pid"]
                    self.samples.append((resident_bytes(self.pid) or 0, engine, resident_bytes(engine)))
                except OSError as error:
                    self._report(f"/health: {error}")
                await asyncio.sleep(every)
        self._stop.set()

    def _report(self, problem: str) -> None:
        self.problems.append(problem)
        tqdm.write(f"LOST {problem}", file=sys.stderr)


def growth(values: Sequence[int]) -> dict[str, Any]:
    """Median megabytes of the first and the last fifth of the samples, after a warm-up of a tenth."""
    warm = values[len(values) // 10 :]
    fifth = max(1, len(warm) // 5)
    first, last = statistics.median(warm[:fifth]), statistics.median(warm[-fifth:])
    return {"first_mb": first / 1e6, "last_mb": last / 1e6, "grew": last > GROWTH * first + SLACK}


def memory(samples: Sequence[tuple[int, int | None, int | None]]) -> dict[str, Any]:
    """Growth of the API process, and of every engine that lived for ten samples."""
    pids = {pid for _, pid, size in samples if pid and size}
    engines = [[size for _, pid, size in samples if pid == engine and size] for engine in pids]
    longest = [growth(sizes) for sizes in engines if len(sizes) >= 10]
    return {"api": growth([size for size, _, _ in samples]), "engines": longest}


def finished_total(address: Address) -> int:
    """Number of ended sequences in the metrics of the server."""
    with urlopen(f"http://{address[0]}:{address[1]}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return round(sum(float(line.split()[-1]) for line in lines if line.startswith("allattn_requests_finished_total{")))


def settle(server: ServerProcess, soak: Soak, *, minutes: float) -> dict[str, Any]:
    """Stop the server and check its counts, its exit status, its processes and its memory."""
    finished = finished_total(server.address)
    children = map(int, Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split())
    engines = {*children, *(pid for _, pid, _ in soak.samples if pid)}
    status = server.stop()
    summaries = [line for line in server.log.read_text(errors="replace").splitlines() if '"finish_reasons"' in line]
    logged = sum(json.loads(line)["sequences"] for line in summaries)  # number of sequences in the server's log
    alive = [pid for pid in engines if is_alive(pid)]
    counts = {"known": soak.num_admitted, "maybe": soak.num_maybe, "finished": finished, "logged": logged}
    sizes = memory(soak.samples)
    grew = minutes >= JUDGED_MINUTES and any(process["grew"] for process in (sizes["api"], *sizes["engines"]))
    checks = {
        "every_request_ended": not soak.problems,
        "books_agree": counts["known"] <= finished <= counts["known"] + counts["maybe"] and logged == finished,
        "exit_status_0": status == 0,
        "no_process_left": not alive,
        "memory_is_flat": not grew,
    }
    return {"checks": checks, "sequences": counts, "memory": sizes, "problems": soak.problems[:MAX_LOST]}


def main(argv: Sequence[str]) -> int:
    """Run the test and print the results; returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--bundle", default="bundles/default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-every", type=float, default=150.0, help="mean seconds between kills; 0 = never")
    parser.add_argument("--out", type=Path, help="file for the JSON line, too")
    args = parser.parse_args(argv)
    args.kill_every = min(args.kill_every, args.minutes * 60 / 3)
    with ServerProcess(["--bundle", args.bundle, *SMALL]) as server:
        soak = Soak(server, args)
        uvloop.run(soak.run())
        result = settle(server, soak, minutes=args.minutes)
        if not all(result["checks"].values()):
            print(server.tail(), file=sys.stderr)
    endings = {f"{kind}, {ending}": number for (kind, ending), number in sorted(soak.endings.items())}
    for name, value in {**endings, **result["sequences"], **result["checks"]}.items():
        print(f"{name:>28} {value}")
    facts = {"benchmark": "soak", "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    facts |= {"machine": machine(), "minutes": args.minutes, "seed": args.seed, "kills": len(soak.outages)}
    print(line := json.dumps({**facts, "requests": soak.endings.total(), "endings": endings, **result}))
    if args.out:
        args.out.write_text(line + "\n")
    return 0 if all(result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

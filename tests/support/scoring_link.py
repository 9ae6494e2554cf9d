"""An engine that scores a token by its id alone, in messages of any length: for the tests of POST /score."""

import asyncio
from typing import Any

import numpy as np

from server.protocol.messages import Ended, Extras, Score, Scores, Timings

TIMINGS = Timings(queue_ms=1.0, prefill_ms=2.0, decode_ms=0.0)
NO_EXTRAS = Extras()


def logprobs_of(tokens: np.ndarray) -> np.ndarray:
    return (-(tokens % 7) / 4 - 0.25).astype("<f4")


def ranks_of(tokens: np.ndarray) -> np.ndarray:
    return (tokens % 3).astype("<i4")


def scores_of(name: str, tokens: np.ndarray, extras: Extras = NO_EXTRAS) -> Scores:
    """Figures that depend on nothing but the token."""
    num = len(tokens)
    places = np.arange(extras.num_top)
    return Scores(
        name,
        logprobs_of(tokens).tobytes(),
        ranks_of(tokens).tobytes(),
        top_ids=((tokens[:, None] + places) % 256).astype("<i4").tobytes(),
        top_logprobs=np.broadcast_to(-places - 0.5, (num, len(places))).astype("<f4").tobytes(),
        entropies=(tokens / 64).astype("<f4").tobytes() if extras.entropy else b"",
        memory_shares=np.stack([tokens / 256, 1 - tokens / 256], axis=1).astype("<f4").tobytes()
        if extras.memory_share
        else b"",
    )


class ScoringLink:
    """An engine that scores a token by its id alone, `chunk` tokens a message; `hang` keeps the endings back."""

    on_step = None
    ready = None
    failure = ""
    restarts = num_waiting = tokens_waiting = rows_used = 0
    heartbeat_age_s = last_step_age_s = 0.1

    def __init__(self, *, chunk: int = 1000, hang: bool = False) -> None:
        self.state: Any = "ready"
        self.chunk = chunk
        self.hang = hang
        self.submitted: list[Score] = []
        self.cancelled: list[str] = []
        self.streams: dict[str, asyncio.Queue[Any]] = {}

    async def start(self) -> None: ...

    async def close(self, grace_s: float) -> None: ...

    def submit(self, message: Score) -> list["ScoringStream"]:
        self.submitted.append(message)
        targets = [ids_in(message.tokens)[message.num_shared + 1 :]]
        targets += [ids_in(tokens)[1:] for _, tokens in message.forks]
        return [self._stream(name, one, message.extras) for name, one in zip(message.ids, targets, strict=True)]

    def _stream(self, name: str, targets: np.ndarray, extras: Extras) -> "ScoringStream":
        queue = self.streams[name] = asyncio.Queue()
        for start in range(0, len(targets), self.chunk):
            queue.put_nowait(scores_of(name, targets[start : start + self.chunk], extras))
        if not self.hang:
            queue.put_nowait(Ended(name, "scored", TIMINGS))
        return ScoringStream(queue)

    def end_all(self, finish_reason: str) -> None:
        for name, queue in self.streams.items():
            queue.put_nowait(Ended(name, finish_reason, TIMINGS, "broken" if finish_reason == "error" else ""))

    def cancel(self, sequence: str) -> None:
        self.cancelled.append(sequence)


class ScoringStream:
    """Two messages at a time, so that an answer is made of several turns."""

    def __init__(self, queue: "asyncio.Queue[Any]") -> None:
        self._queue = queue

    async def take(self) -> list[Any]:
        first = await self._queue.get()
        return [first] if self._queue.empty() else [first, self._queue.get_nowait()]


def ids_in(raw: bytes) -> np.ndarray:
    return np.frombuffer(raw, dtype="<i4")


def ids_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype("<i4")

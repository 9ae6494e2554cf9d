"""An engine without a model: it answers with a script, so that a test of the HTTP side knows every byte to expect."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Literal

import numpy as np

from server.messages import Ended, Generate, Ready, Score, Scores, Step, Timings, Token

TIMINGS = Timings(queue_ms=1.0, prefill_ms=2.0, decode_ms=3.0)


class FakeLink:
    """Generates `script` over and over, one token a step of `step_s`; scores a token by its id alone.

    `hang` keeps a sequence after so many tokens until it is cancelled or `end_all` is called.
    """

    def __init__(self, script: list[int], *, step_s: float = 0.0, hang_after: int | None = None) -> None:
        self.script = script
        self.step_s = step_s
        self.hang_after = hang_after
        self.state: Literal["starting", "ready", "draining", "failed"] = "ready"
        self.ready: Ready | None = Ready(
            pid=1, device="cpu", dtype="float32", num_rows=2, state_bytes_per_row=64, spans=((32, 40),)
        )
        self.failure = ""
        self.heartbeat_age_s = 0.1
        self.last_step_age_s = 0.1
        self.num_waiting = 0
        self.rows_used = 0
        self.on_step: Callable[[Step], None] | None = None
        self.submitted: list[Generate | Score] = []
        self.cancelled: list[str] = []
        self.num_hanging = 0
        self._endings: dict[str, asyncio.Future[Ended]] = {}

    async def start(self) -> None:
        await asyncio.sleep(self.step_s)
        self.state = "failed" if self.failure else "ready"

    async def close(self, grace_s: float) -> None:
        self.state = "draining" if self.state == "ready" else self.state
        pending = [ending for ending in self._endings.values() if not ending.done()]
        if pending:
            await asyncio.wait(pending, timeout=grace_s)
        self.end_all("shutdown")

    def submit(self, message: Generate | Score) -> AsyncIterator[Token | Scores | Ended]:
        self.submitted.append(message)
        self._endings[message.id] = asyncio.get_running_loop().create_future()
        return self._generate(message) if isinstance(message, Generate) else self._score(message)

    def cancel(self, sequence: str) -> None:
        self.cancelled.append(sequence)
        self._end(sequence, Ended(sequence, "cancelled", TIMINGS))

    def end_all(self, finish_reason: str, *, error: str = "") -> None:
        for sequence in self._endings:
            self._end(sequence, Ended(sequence, finish_reason, TIMINGS, error))

    def _end(self, sequence: str, ended: Ended) -> None:
        if not self._endings[sequence].done():
            self._endings[sequence].set_result(ended)

    async def _generate(self, message: Generate) -> AsyncIterator[Token | Ended]:
        ending = self._endings[message.id]
        self.rows_used += 1
        for i in range(message.max_new_tokens):
            if i == self.hang_after:
                self.num_hanging += 1
                await ending
            await asyncio.sleep(self.step_s)
            if ending.done():
                break
            token = self.script[i % len(self.script)]
            if self.on_step is not None:
                self.on_step(Step(num_decoded=1, seconds=0.001))
            yield Token(message.id, token, -0.5)
            if token in message.stop_token_ids:
                self._end(message.id, Ended(message.id, "eos_token", TIMINGS))
        self._end(message.id, Ended(message.id, "length", TIMINGS))
        self.rows_used -= 1
        yield ending.result()

    async def _score(self, message: Score) -> AsyncIterator[Scores | Ended]:
        ending = self._endings[message.id]
        targets = np.frombuffer(message.tokens, dtype="<i4")[1:]
        for chunk in np.split(targets, range(1000, len(targets), 1000)):
            if self.hang_after is not None:
                await ending
            await asyncio.sleep(self.step_s)
            if ending.done():
                break
            ranks = (chunk % 3).astype("<i4")
            yield Scores(message.id, fake_logprobs(chunk).tobytes(), ranks.tobytes())
        self._end(message.id, Ended(message.id, "scored", TIMINGS))
        yield ending.result()


def fake_logprobs(tokens: np.ndarray) -> np.ndarray:
    """What a FakeLink scores tokens with."""
    return (-(tokens % 7) / 4 - 0.25).astype("<f4")

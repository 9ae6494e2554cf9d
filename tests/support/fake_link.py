"""An engine without a model: it answers with a script, so that a test of the HTTP side knows every byte it gets."""

import asyncio
from collections.abc import AsyncIterator, Callable

import numpy as np

from server.link.mailbox import Stream
from server.protocol.messages import (
    Ended,
    EngineFacts,
    Extras,
    Generate,
    LinkState,
    Ready,
    Score,
    Scores,
    Step,
    Timings,
    Token,
)

TIMINGS = Timings(queue_ms=1.0, prefill_ms=2.0, decode_ms=3.0)
NO_EXTRAS = Extras()


class FakeLink:
    """A link that generates `script` over and over, one token every `step_s`; a token's score depends on its id alone.

    A sampled sequence begins the script at the position that its seed says. Scores come in messages of `chunk` tokens.
    `hang_after` stops a sequence after that many generated tokens, or after that many scored tokens and before the last
    message with scores, until it is cancelled or `end_all` is called.
    """

    def __init__(
        self,
        script: list[int],
        *,
        step_s: float = 0.0,
        chunk: int = 1000,
        hang_after: int | None = None,
        max_behind: int = 4096,
    ) -> None:
        self.script = script
        self.chunk = chunk
        self.step_s = step_s
        self.hang_after = hang_after
        self.max_behind = max_behind
        self.state: LinkState = "ready"
        self.ready: Ready | None = Ready(
            pid=1,
            facts=EngineFacts(
                backend="torch",
                device="cpu",
                dtype="float32",
                weights="float32",
                num_rows=2,
                state_bytes_per_row=64,
                batch_invariant=True,
                spans=((32, 40),),
            ),
        )
        self.failure = ""
        self.blames_model = False
        self.asked_to_end = False
        self.restarts = 0
        self.heartbeat_age_s = 0.1
        self.last_step_age_s = 0.1
        self.num_waiting = 0
        self.tokens_waiting = 0
        self.rows_used = 0
        self.on_step: Callable[[Step], None] | None = None
        self.submitted: list[Generate | Score] = []
        self.cancelled: list[str] = []
        self.num_hanging = 0
        self._endings: dict[str, asyncio.Future[Ended]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await asyncio.sleep(self.step_s)
        self.state = "failed" if self.failure else "ready"

    async def close(self, grace_s: float) -> None:
        self.state = "draining" if self.state == "ready" else self.state
        pending = [ending for ending in self._endings.values() if not ending.done()]
        if pending:
            await asyncio.wait(pending, timeout=grace_s)
        self.end_all("shutdown")

    def submit(self, message: Generate | Score) -> list[Stream]:
        self.submitted.append(message)
        streams = []
        for place, name in enumerate(message.ids):
            self._endings[name] = asyncio.get_running_loop().create_future()
            said = self._generate(message, place) if isinstance(message, Generate) else self._score(message, place)
            streams.append(Stream(max_behind=self.max_behind))
            task = asyncio.create_task(self._play(said, streams[-1]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return streams

    def cancel(self, sequence: str) -> None:
        self.cancelled.append(sequence)
        self._end(sequence, Ended(sequence, "cancelled", TIMINGS))

    def end_all(self, finish_reason: str, *, error: str = "") -> None:
        for sequence in self._endings:
            self._end(sequence, Ended(sequence, finish_reason, TIMINGS, error))

    async def _play(self, said: AsyncIterator[Token | Scores | Ended], stream: Stream) -> None:
        async for message in said:
            if not stream.put(message) and not isinstance(message, Ended):
                self.cancel(message.sequence)  # as the link does if a client reads too slowly

    def _end(self, sequence: str, ended: Ended) -> None:
        if not self._endings[sequence].done():
            self._endings[sequence].set_result(ended)

    async def _generate(self, message: Generate, place: int) -> AsyncIterator[Token | Scores | Ended]:
        name, sampling = message.ids[place], message.sampling
        seed = sampling.seed if place == 0 else message.forks[place - 1][1]
        first = seed if sampling.temperature else 0
        ending = self._endings[name]
        self.rows_used += 1
        if message.prompt_extras is not None and place == 0:
            targets = np.frombuffer(message.tokens, dtype="<i4")[1:]
            for part in self._parts(targets):
                yield fake_scores(name, part, message.prompt_extras)
        for i in range(message.max_new_tokens):
            if i == self.hang_after:
                self.num_hanging += 1
                await ending
            await asyncio.sleep(self.step_s)
            if ending.done():
                break
            token = self.script[(first + i) % len(self.script)]
            said = Token(name, token, -0.5 - place / 8, _top([token], sampling.num_top)[0])
            if self.on_step is not None:
                self.on_step(Step(tokens=(said,), num_decoded=min(i, 1), num_prefilled=int(i == 0), seconds=0.001))
            yield said
            if token in sampling.end_ids and i + 1 >= sampling.min_new_tokens:
                self._end(name, Ended(name, "eos_token", TIMINGS))
        self._end(name, Ended(name, "length", TIMINGS))
        self.rows_used -= 1
        yield ending.result()

    async def _score(self, message: Score, place: int) -> AsyncIterator[Scores | Ended]:
        name = message.ids[place]
        ending = self._endings[name]
        tokens = message.tokens if place == 0 else message.forks[place - 1][1]
        targets = np.frombuffer(tokens, dtype="<i4")[1 + (message.num_shared if place == 0 else 0) :]
        parts = self._parts(targets)
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            if self.hang_after is not None and (is_last or number * self.chunk >= self.hang_after):
                self.num_hanging += 1
                await ending
            if number % 2 == 0:  # so that the reader sometimes gets one message at a time and sometimes two
                await asyncio.sleep(self.step_s)
            if ending.done():
                break
            yield fake_scores(name, part, message.extras)
        self._end(name, Ended(name, "scored", TIMINGS))
        yield ending.result()

    def _parts(self, tokens: np.ndarray) -> list[np.ndarray]:
        return [tokens[start : start + self.chunk] for start in range(0, len(tokens), self.chunk)]


def fake_logprobs(tokens: np.ndarray) -> np.ndarray:
    """Return the log-probabilities that a FakeLink gives: multiples of 1/4, so that their sums are exact."""
    return (-(tokens % 7) / 4 - 0.25).astype("<f4")


def fake_ranks(tokens: np.ndarray) -> np.ndarray:
    """Return the ranks that a FakeLink gives."""
    return (tokens % 3).astype("<i4")


def fake_scores(name: str, tokens: np.ndarray, extras: Extras = NO_EXTRAS) -> Scores:
    """Return a FakeLink's message with scores. Every figure depends on the token alone and is exact in binary."""
    tops = np.array(_top(tokens.tolist(), extras.num_top)).reshape(len(tokens), extras.num_top, 2)
    shares = np.stack([tokens / 256, 1 - tokens / 256], axis=1)  # for two layers
    return Scores(
        name,
        fake_logprobs(tokens).tobytes(),
        fake_ranks(tokens).tobytes(),
        tops[..., 0].astype("<i4").tobytes(),
        tops[..., 1].astype("<f4").tobytes(),
        (tokens / 64).astype("<f4").tobytes() if extras.entropy else b"",
        shares.astype("<f4").tobytes() if extras.memory_share else b"",
    )


def _top(tokens: list[int], count: int) -> list[tuple[tuple[int, float], ...]]:
    """Return each token with the tokens after it, each less probable than the token before it."""
    return [tuple(((token + i) % 256, -0.5 - i) for i in range(count)) for token in tokens]

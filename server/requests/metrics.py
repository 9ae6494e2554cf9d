"""What the server counts, for Prometheus. Names and meanings are vLLM's where it has them. Knows no request."""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from server.protocol.messages import LinkState, Step

# A token takes well under a millisecond on a GPU, a long document minutes on a CPU.
TIME_BUCKETS = tuple(scale * base for scale in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10) for base in (5, 10, 25))
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class EngineState(Protocol):
    """What is read off the link whenever the metrics are."""

    @property
    def state(self) -> LinkState: ...  # noqa: D102
    @property
    def restarts(self) -> int: ...  # noqa: D102
    @property
    def heartbeat_age_s(self) -> float: ...  # noqa: D102
    @property
    def rows_used(self) -> int: ...  # noqa: D102
    @property
    def num_waiting(self) -> int: ...  # noqa: D102
    @property
    def tokens_waiting(self) -> int: ...  # noqa: D102


class Metrics:
    """All of them, in a registry of their own."""

    def __init__(self, engine: EngineState, *, num_rows: int) -> None:
        self.registry = CollectorRegistry()
        self._gauge("num_requests_running", "Sequences that hold a row.", lambda: engine.rows_used)
        self._gauge("rows_used", "Rows of the batch in use.", lambda: engine.rows_used)
        self._gauge("rows", "Rows of the batch.", lambda: num_rows)
        self._gauge("num_requests_waiting", "Sequences that wait for a row.", lambda: engine.num_waiting)
        self._gauge("num_tokens_waiting", "Prompt tokens that wait to be read.", lambda: engine.tokens_waiting)
        self._gauge("engine_ready", "1 while work is taken.", lambda: int(engine.state == "ready"))
        self._gauge("engine_restarts", "Engine processes that were replaced.", lambda: engine.restarts)
        self._gauge(
            "engine_heartbeat_age_seconds", "Since the engine last said anything.", lambda: engine.heartbeat_age_s
        )
        self._first_token = self._time("time_to_first_token_seconds", "From admission to the first token.")
        self._token_gap = TokenHistogram(
            "allattn_inter_token_latency_seconds", "Between two tokens of a sequence.", bounds=TIME_BUCKETS
        )
        self.registry.register(self._token_gap)
        self._stepped = time.perf_counter()
        self._queue_time = self._time("request_queue_time_seconds", "Waiting for a row.")
        self._latency = self._time("e2e_request_latency_seconds", "From admission to the ending.")
        self._step = self._time("step_duration_seconds", "One step of the engine.", "phase")
        self._batch = Histogram(
            "allattn_batch_size", "Rows that a step decoded.", buckets=BATCH_BUCKETS, registry=self.registry
        )
        self._prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens of finished generations.")
        self._new_tokens = self._counter("generation_tokens_total", "Generated tokens.")
        self._scored_tokens = self._counter("scored_tokens_total", "Tokens of finished scorings.")
        self._finished = self._counter("requests_finished_total", "Sequences by their ending.", "finish_reason")
        self._rejected = self._counter("requests_rejected_total", "Requests refused, by reason.", "reason")

    def observe_step(self, step: Step) -> None:
        """One step of the engine, as it is heard of. Steps without work are not counted.

        A row that decodes had its token before in the step before, so the time between two steps is that between two
        tokens of each of its rows.
        """
        now = time.perf_counter()
        if step.num_decoded:
            self._token_gap.observe(now - self._stepped, step.num_decoded)
        self._stepped = now
        self._new_tokens.inc(len(step.tokens))
        if not step.num_decoded and not step.num_prefilled:
            return
        phase = "mixed" if step.num_decoded and step.num_prefilled else "decode" if step.num_decoded else "prefill"
        self._step.labels(phase).observe(step.seconds)
        if step.num_decoded:
            self._batch.observe(step.num_decoded)

    def observe_first_token(self, seconds: float) -> None:
        """Since the sequence was admitted."""
        self._first_token.observe(seconds)

    def count_finished(
        self, finish_reason: str, *, seconds: float, queue_s: float, prompt_tokens: int = 0, scored_tokens: int = 0
    ) -> None:
        """A sequence has had its ending, `seconds` after it was admitted."""
        self._finished.labels(finish_reason).inc()
        self._latency.observe(seconds)
        self._queue_time.observe(queue_s)
        self._prompt_tokens.inc(prompt_tokens)
        self._scored_tokens.inc(scored_tokens)

    def count_abandoned(self, finish_reason: str) -> None:
        """A sequence had no answer: its client left ("cancelled") or the engine gave it up ("error")."""
        self._finished.labels(finish_reason).inc()

    def count_rejected(self, reason: str) -> None:
        """A request was answered with an error. `reason` is the error's code."""
        self._rejected.labels(reason).inc()

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(f"allattn_{name}", text, registry=self.registry).set_function(read)

    def _time(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"allattn_{name}", text, labels, buckets=TIME_BUCKETS, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"allattn_{name}", text, labels, registry=self.registry)


class TokenHistogram(Collector):
    """A histogram that costs a fraction of a microsecond a token, for the one event that happens for every token."""

    def __init__(self, name: str, text: str, *, bounds: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int) -> None:
        """Add `count` events of one value."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What Prometheus reads."""
        buckets, total = [], 0
        for bound, number in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += number
            buckets.append((bound, float(total)))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)

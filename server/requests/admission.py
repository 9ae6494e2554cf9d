"""Admission control: limits on live sequences and on waiting prompt tokens, checked before any work is done.

Knows no HTTP and no engine: the service reports which sequences enter and leave.
"""

import time
from collections import deque
from collections.abc import Callable

from server.errors import InvalidField, QueueFull

RATE_WINDOW = 64  # endings over which the rate is measured
RATE_HORIZON_S = 30.0  # older endings say nothing about the present rate
FIRST_GUESS_S = 1.0  # the wait that a client gets while no sequence has ended yet
LONGEST_WAIT_S = 60.0


class Admission:
    """Counter of live sequences and waiting prompt tokens that refuses a request over the limits."""

    def __init__(
        self,
        *,
        max_sequences: int,
        max_tokens: int,
        tokens_waiting: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nothing admitted.

        Args:
            max_sequences: the most sequences that may live, with a row or waiting for one.
            max_tokens: the most prompt tokens that may wait to be read.
            tokens_waiting: returns the prompt tokens that wait, as the engine last reported them.
            clock: returns seconds.
        """
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.num_live = 0
        # Tokens admitted before and after the engine's last report. That report may not count them yet.
        self._unreported = [0, 0]
        self._tokens_waiting = tokens_waiting
        self._endings: deque[float] = deque(maxlen=RATE_WINDOW)
        self._clock = clock

    def check(self, num_sequences: int, *, num_tokens: int, field: str = "inputs") -> None:
        """Refuse a request over the limits. `field` names the field that sets the number of sequences.

        A request is never refused for its tokens while no other tokens wait: it could never be served.

        Raises:
            InvalidField: the request would not fit into an empty server.
            QueueFull: the request does not fit now.
        """
        if num_sequences > self.max_sequences:
            raise InvalidField(
                f"{field}: {num_sequences} sequences are not allowed; at most {self.max_sequences}",
                param=field.partition(",")[0],
            )
        excess = self.num_live + num_sequences - self.max_sequences
        if excess > 0:
            raise QueueFull(
                f"{self.num_live} sequences are running or waiting and {num_sequences} more were asked for; "
                f"the limit is {self.max_sequences}",
                retry_after_s=self.seconds_until_ended(excess),
            )
        waiting = self._tokens_waiting() + sum(self._unreported)
        if waiting and waiting + num_tokens > self.max_tokens:
            raise QueueFull(
                f"{waiting} prompt tokens wait to be read and up to {num_tokens} more were asked for; "
                f"the limit is {self.max_tokens}",
                retry_after_s=self.seconds_until_ended(1),
            )

    def enter(self, num_sequences: int, *, num_tokens: int) -> None:
        """Count admitted sequences as live, and their prompt tokens as waiting."""
        self.num_live += num_sequences
        self._unreported[1] += num_tokens

    def hear(self) -> None:
        """Note a report of the engine, which counts all tokens admitted before its previous report.

        Tokens admitted since then stay unreported: their message may still have been on its way to the engine.
        """
        self._unreported = [self._unreported[1], 0]

    def leave(self) -> None:
        """Count one sequence as ended."""
        self.num_live -= 1
        self._endings.append(self._clock())

    def seconds_until_ended(self, num_sequences: int) -> float:
        """Return the seconds until `num_sequences` will have ended, at the rate of the latest endings."""
        now = self._clock()
        while self._endings and self._endings[0] < now - RATE_HORIZON_S:
            self._endings.popleft()
        if not self._endings:
            return FIRST_GUESS_S
        per_second = len(self._endings) / max(now - self._endings[0], 1e-3)
        return min(num_sequences / per_second, LONGEST_WAIT_S)

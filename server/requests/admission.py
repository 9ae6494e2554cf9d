"""How much may wait: sequences and prompt tokens, decided before any work is done, and when there will be room again.

Knows no HTTP and no engine; it is told what comes and what goes.
"""

import time
from collections import deque
from collections.abc import Callable

from server.errors import InvalidField, QueueFull

RATE_WINDOW = 64  # endings that the drain rate is measured over
RATE_HORIZON_S = 30.0  # older ones say nothing about now
FIRST_GUESS_S = 1.0  # when to come back, while nothing has ended yet
LONGEST_WAIT_S = 60.0


class Admission:
    """Counts what lives and what waits to be read, and refuses what would be too much."""

    def __init__(
        self,
        *,
        max_sequences: int,
        max_tokens: int,
        tokens_waiting: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Of sequences at most so many may live, computed or waiting; of tokens so many wait to be read.

        tokens_waiting: as the engine last said.
        """
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.num_live = 0
        self._unheard = [0, 0]  # tokens that came before and after the engine's last word, of which it may not know yet
        self._tokens_waiting = tokens_waiting
        self._endings: deque[float] = deque(maxlen=RATE_WINDOW)
        self._clock = clock

    def check(self, num_sequences: int, *, num_tokens: int, field: str = "inputs") -> None:
        """Refuse so many sequences of so many prompt tokens. `field` is what asks for so many.

        A request is never refused for its tokens while nothing else waits, or it would never be served.

        Raises:
            InvalidField: they would not fit into an empty server.
            QueueFull: they do not fit now.
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
        waiting = self._tokens_waiting() + sum(self._unheard)
        if waiting and waiting + num_tokens > self.max_tokens:
            raise QueueFull(
                f"{waiting} prompt tokens wait to be read and up to {num_tokens} more were asked for; "
                f"the limit is {self.max_tokens}",
                retry_after_s=self.seconds_until_ended(1),
            )

    def enter(self, num_sequences: int, *, num_tokens: int) -> None:
        """They live from now on, and so many prompt tokens wait to be read."""
        self.num_live += num_sequences
        self._unheard[1] += num_tokens

    def hear(self) -> None:
        """The engine has said what waits; what came since its word before this one may have crossed it on its way."""
        self._unheard = [self._unheard[1], 0]

    def leave(self) -> None:
        """One has ended."""
        self.num_live -= 1
        self._endings.append(self._clock())

    def seconds_until_ended(self, num_sequences: int) -> float:
        """How long it will take until so many have ended, at the rate of the last endings."""
        now = self._clock()
        while self._endings and self._endings[0] < now - RATE_HORIZON_S:
            self._endings.popleft()
        if not self._endings:
            return FIRST_GUESS_S
        per_second = len(self._endings) / max(now - self._endings[0], 1e-3)
        return min(num_sequences / per_second, LONGEST_WAIT_S)

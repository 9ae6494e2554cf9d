"""Who gets a row and what a step computes: state in, plan out. Knows no torch, no clock and no messages.

A step decodes every row that generates, and then spends a bounded budget on reading prompts and documents, so that no
prompt, however long, stalls a stream. Every sequence costs the same state, so admission is counting rows.
"""

from collections import deque
from dataclasses import dataclass

from server.engine.sequence import Phase, Sequence


@dataclass(frozen=True)
class Move:
    """A sequence changes rows, its state with it."""

    source: int
    target: int


@dataclass(frozen=True)
class Reading:
    """A sequence reads some of its tokens."""

    sequence: Sequence
    size: int


@dataclass(frozen=True)
class Plan:
    """One step: fresh rows, moves, decoding, reading; done in this order."""

    admitted: tuple[Sequence, ...]  # begin in the rows they were given
    moves: tuple[Move, ...]
    decoding: tuple[Sequence, ...]
    reading: tuple[Reading, ...]


class Scheduler:
    """Sequences that wait, in order, and sequences that have a row."""

    def __init__(self, *, num_rows: int, chunk_tokens: int) -> None:
        """chunk_tokens: the most that one row reads in a step."""
        self.chunk_tokens = chunk_tokens
        self.waiting: deque[Sequence] = deque()
        self.rows: list[Sequence | None] = [None] * num_rows
        self._readers: deque[Sequence] = deque()  # who reads next, in turns

    @property
    def num_used(self) -> int:
        """Rows that are taken."""
        return sum(sequence is not None for sequence in self.rows)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting) or self.num_used > 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence for a row."""
        sequence.phase = Phase.WAITING
        self.waiting.append(sequence)

    def add_first(self, sequence: Sequence) -> None:
        """Queue a sequence before all others: what it shares with another one has been read already."""
        sequence.phase = Phase.WAITING
        self.waiting.appendleft(sequence)

    def release(self, sequence: Sequence) -> None:
        """Take back the row, or the place in the queue, of a sequence that has ended."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        elif sequence.phase is not Phase.FORKING:
            assert self.rows[sequence.row] is sequence
            self.rows[sequence.row] = None
            if sequence.phase is Phase.READING:
                self._readers.remove(sequence)
        sequence.phase, sequence.row = Phase.ENDED, -1

    def plan(self, budget_tokens: int) -> Plan:
        """Decide the next step; rows are given out and moved in `rows` at once, progress is made by `commit`.

        Args:
            budget_tokens: the most that all rows read together; one chunk is read in any case.
        """
        admitted = self._admit()
        moves = self._close_gaps()
        decoding = tuple(s for s in self.rows if s is not None and s.phase is Phase.DECODING)
        return Plan(admitted, moves, decoding, self._share(budget_tokens))

    def commit(self, reading: Reading) -> None:
        """A stretch was read; who has read all begins to decode."""
        sequence = reading.sequence
        sequence.num_read += reading.size
        if sequence.num_unread == 0:
            self._readers.remove(sequence)
            sequence.phase = Phase.DECODING

    def check_idle(self) -> None:
        """Account for all rows and the queue when no sequence lives. Raises RuntimeError where one is lost."""
        if self.waiting or self._readers or any(self.rows):
            raise RuntimeError(
                f"no sequence lives, but {self.num_used} rows are taken, {len(self.waiting)} sequences wait "
                f"and {len(self._readers)} read"
            )

    def _close_gaps(self) -> tuple[Move, ...]:
        """Decoding computes rows 0 .. the highest: bring high rows down, so that no free one is computed idly."""
        moves = []
        while (top := self._highest()) >= self.num_used:
            sequence = self.rows[top]
            assert sequence is not None
            target = self.rows.index(None)
            self.rows[top], self.rows[target] = None, sequence
            sequence.row = target
            moves.append(Move(top, target))
        return tuple(moves)

    def _highest(self) -> int:
        return max((row for row, sequence in enumerate(self.rows) if sequence is not None), default=-1)

    def _admit(self) -> tuple[Sequence, ...]:
        admitted = []
        while self.waiting and None in self.rows:
            sequence = self.waiting.popleft()
            sequence.row = self.rows.index(None)
            self.rows[sequence.row] = sequence
            admitted.append(sequence)
            if sequence.num_unread:
                sequence.phase = Phase.READING
                self._readers.append(sequence)
            else:
                sequence.phase = Phase.DECODING
        return tuple(admitted)

    def _share(self, budget_tokens: int) -> tuple[Reading, ...]:
        """Give the readers at the head of the line a whole chunk each, and send them to its end."""
        readings: list[Reading] = []
        left = budget_tokens
        for _ in range(len(self._readers)):
            sequence = self._readers[0]
            size = sequence.chunk_size(self.chunk_tokens)
            if readings and size > left:
                break
            left -= size
            readings.append(Reading(sequence, size))
            self._readers.rotate(-1)
        return tuple(readings)

"""The scheduler: assigns rows to sequences and plans each step. Knows no torch, no clock and no messages.

A step decodes every row that generates, and then spends a bounded budget of tokens on reading (prefilling) prompts and
documents, so that no prompt, however long, stalls a stream. The state of every sequence has the same size, so a
sequence needs only a free row.
"""

from collections import deque
from dataclasses import dataclass

from server.engine.sequence import Phase, Sequence


@dataclass(frozen=True)
class Move:
    """A move of a sequence, with its state, to another row."""

    source: int
    target: int


@dataclass(frozen=True)
class Reading:
    """A chunk of tokens that a sequence reads in a step. `size`: number of tokens."""

    sequence: Sequence
    size: int


@dataclass(frozen=True)
class Plan:
    """The plan of one step: new rows, moves, decoding, reading, in this order."""

    admitted: tuple[Sequence, ...]  # sequences that begin in their new rows
    moves: tuple[Move, ...]
    decoding: tuple[Sequence, ...]
    reading: tuple[Reading, ...]


class Scheduler:
    """The scheduler of a batch: a queue of waiting sequences, and a row for each admitted sequence."""

    def __init__(self, *, num_rows: int, chunk_tokens: int) -> None:
        """chunk_tokens: the most tokens that one row reads in a step."""
        self.chunk_tokens = chunk_tokens
        self.waiting: deque[Sequence] = deque()
        self.rows: list[Sequence | None] = [None] * num_rows
        self._readers: deque[Sequence] = deque()  # the sequences that read, in turns

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
        """Queue a sequence before all others, because its leader has already read the shared tokens."""
        sequence.phase = Phase.WAITING
        self.waiting.appendleft(sequence)

    def release(self, sequence: Sequence) -> None:
        """Free the row, or the position in the queue, of a sequence that has ended."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        elif sequence.phase is not Phase.FORKING:
            assert self.rows[sequence.row] is sequence
            self.rows[sequence.row] = None
            if sequence.phase is Phase.READING:
                self._readers.remove(sequence)
        sequence.phase, sequence.row = Phase.ENDED, -1

    def plan(self, budget_tokens: int) -> Plan:
        """Return the plan of the next step. Assigns and moves rows at once; `commit` records the progress of reading.

        Args:
            budget_tokens: the most tokens that all rows read together; one chunk is read in any case.
        """
        admitted = self._admit()
        moves = self._close_gaps()
        decoding = tuple(s for s in self.rows if s is not None and s.phase is Phase.DECODING)
        return Plan(admitted, moves, decoding, self._share(budget_tokens))

    def commit(self, reading: Reading) -> None:
        """Record a chunk as read; a sequence that has read all its tokens begins to decode."""
        sequence = reading.sequence
        sequence.num_read += reading.size
        if sequence.num_unread == 0:
            self._readers.remove(sequence)
            sequence.phase = Phase.DECODING

    def check_idle(self) -> None:
        """Check that all rows and the queue are empty while no sequence lives. Raises RuntimeError otherwise."""
        if self.waiting or self._readers or any(self.rows):
            raise RuntimeError(
                f"no sequence lives, but {self.num_used} rows are taken, {len(self.waiting)} sequences wait "
                f"and {len(self._readers)} read"
            )

    def _close_gaps(self) -> tuple[Move, ...]:
        """Move sequences into lower free rows: decoding computes all rows up to the highest used row."""
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
        """Divide the budget into whole chunks for the first readers, and move these to the end of the queue."""
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

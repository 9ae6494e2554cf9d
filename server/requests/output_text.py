"""The text of a sequence while it grows: joins bytes to characters and finds stop strings. Knows no request.

An Aho-Corasick automaton (Aho and Corasick 1975) finds the stop strings. Its state after a text is the longest suffix
of the text that begins some stop string: exactly this suffix must be held back. A character costs the same for one stop
string as for a thousand.
"""

from collections import deque
from collections.abc import Sequence

from model.tokenizer import StreamingDecoder, Tokenizer


class StopStrings:
    """An automaton of all stop strings of a request. It holds no text, so the sequences of a request share it.

    A state is the number of a node, which stands for a prefix of some stop string; 0 is the empty prefix.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """Build the automaton, in time linear in the total length. Every stop string has at least one character."""
        assert all(stops)
        self._children: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]  # the longest stop string that ends in this state
        for stop in stops:
            self._insert(stop)
        self._fallback = [0] * len(self._children)  # the state of the longest proper suffix that is also a prefix
        self._link()

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._children[state]:
                self._children[state][char] = len(self._children)
                self._children.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(None)
            state = self._children[state][char]
        self._match[state] = stop

    def _link(self) -> None:
        """Set all fallbacks, breadth first: a state's fallback is shallower, so it is complete before it is used."""
        queue = deque(self._children[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._children[state].items():
                self._fallback[child] = self.advance(self._fallback[state], char)
                queue.append(child)
            if self._match[state] is None:
                self._match[state] = self._match[self._fallback[state]]

    def __bool__(self) -> bool:
        return len(self._children) > 1

    def advance(self, state: int, char: str) -> int:
        """Return the state after one more character."""
        while state and char not in self._children[state]:
            state = self._fallback[state]
        return self._children[state].get(char, 0)

    def scan(self, state: int, text: str) -> tuple[int, int]:
        """Return the state after `text`, or after the first stop string that it completes, and the characters read."""
        if not state and self._children[0].keys().isdisjoint(text):
            return 0, len(text)
        match, advance = self._match, self.advance
        for end, char in enumerate(text, start=1):
            state = advance(state, char)
            if match[state] is not None:
                return state, end
        return state, len(text)

    def match(self, state: int) -> str | None:
        """Return the longest stop string that ends in this state, or None."""
        return self._match[state]

    def depth(self, state: int) -> int:
        """Return how many of the last characters may still become a stop string."""
        return self._depth[state]


class OutputText:
    """Decoder of one sequence that releases only text the client may see: whole characters, no part of a stop string.

    The stop string that is completed first wins, and the longest if several end at the same character, so the text does
    not depend on its division into tokens. A token costs O(its text + the text held back).

    The text of the first `num_free` tokens is released at once and is no part of any stop string. (A character that a
    later token completes belongs to the later token.)
    """

    def __init__(self, tokenizer: Tokenizer, *, stops: StopStrings, num_free: int = 0) -> None:
        self._decoder = StreamingDecoder(tokenizer)
        self._stops = stops
        self._has_stops = bool(stops)
        self._num_free = num_free  # free tokens left; below 0 once other tokens have come
        self._state = 0
        self._held = ""
        self.matched_stop: str | None = None

    def add(self, token: int) -> str:
        """Return the text that becomes certain with `token`. Sets `matched_stop` once a stop string is complete."""
        assert self.matched_stop is None
        text = self._decoder.add(token)
        return self._release(text) if self._has_stops else text

    def finish(self) -> str:
        """Return the text held back so far, as no token follows; "" after a stop string."""
        if self.matched_stop is not None:
            return ""
        rest = self._decoder.finish()
        if self._num_free >= 0 or not self._has_stops:
            return rest
        text = self._release(rest)
        if self.matched_stop is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        self._num_free -= 1
        if self._num_free >= 0:
            return new
        self._state, end = self._stops.scan(self._state, new)
        self.matched_stop = self._stops.match(self._state)
        text = self._held + new[:end]
        cut = len(text) - (self._stops.depth(self._state) if self.matched_stop is None else len(self.matched_stop))
        self._held = text[cut:]
        return text[:cut]

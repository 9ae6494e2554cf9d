"""Results of generation and scoring, independent of any wire format. Each dialect translates them to its replies."""

from dataclasses import dataclass
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from model.scoring import TextFigures
from server.protocol.messages import FinishReason, Timings


class OutputToken(Struct, frozen=True, gc=False):
    """One token of the output. `text` is the text that became certain with it, so the texts joined are the output.

    In a list of the most probable tokens it is an alternative, and `text` is the text of its own bytes: part of a
    character is U+FFFD.
    """

    id: int
    text: str
    logprob: float | None  # nats, under the model's own distribution
    special: bool  # whether it is the model's end-of-text token


class TopToken(Struct, frozen=True):
    """One of the most probable tokens. `text` is the text of its own bytes, so part of a character is U+FFFD."""

    id: int
    text: str
    logprob: float


class ScoredToken(Struct, frozen=True):
    """One token of a scored text. Its figures are null if no token came before it, and absent if not requested.

    `text` is the text that became certain with it, so the texts joined are the whole. Rank 0 means most probable.
    """

    id: int
    text: str
    logprob: float | None = None  # nats
    rank: int | None = None
    top: list[TopToken] | UnsetType | None = UNSET  # most probable first
    entropy: float | UnsetType | None = UNSET  # nats
    memory_share: list[float] | UnsetType | None = UNSET  # of each layer


class Ending(Struct, frozen=True):
    """The end of a generated sequence: its text, counts and finish reason."""

    text: str  # the whole output
    finish_reason: FinishReason
    num_tokens: int
    num_prompt_tokens: int
    seed: int  # a request of one sequence with this seed repeats it
    matched_stop: str | int | None  # the stop string, or the id from stop_token_ids
    logprob_sum: float
    timings: Timings
    fingerprint: str


class Output(Struct, frozen=True, gc=False):
    """A new piece of a generated sequence. The last output has the `ending`.

    `token` is null if the output has the prompt, or if the sequence ended between two tokens (cancelled, timeout,
    shutdown).
    """

    index: int  # tokens so far
    token: OutputToken | None = None
    top: list[OutputToken] | None = None  # the most probable tokens at its position, best first, if requested
    ending: Ending | None = None
    prompt: list[ScoredToken] | None = None  # the whole prompt, in the first output, if requested


class Generated(Struct, frozen=True):
    """A complete generated sequence."""

    ending: Ending
    tokens: list[OutputToken]
    tops: list[list[OutputToken]]  # the most probable tokens at each position, if requested
    prompt: list[ScoredToken] | None


class TextScore(Struct, frozen=True):
    """The score of one text over its scored tokens."""

    figures: TextFigures
    is_greedy: bool  # whether each token of the text is the most probable token at its position


class ScoreOutput(Struct, frozen=True):
    """A new piece of a scored sequence. The last output has the `score`."""

    num_done: int  # tokens scored so far
    num_tokens: int  # tokens to score in all
    tokens: list[ScoredToken]  # the new tokens, if they are listed
    score: TextScore | None = None


@dataclass(frozen=True, kw_only=True)
class WorkSummary:
    """Counts and times of a request for the log and the traces, and no text. None means unknown or not applicable."""

    sequences: int
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    scored_tokens: int | None = None
    finish_reasons: list[str]
    timings: list[Timings]  # of sequences that have ended
    user: str | None = None

    @property
    def generates(self) -> bool:
        """Whether the request generates tokens; otherwise it only scores."""
        return self.generated_tokens is not None

    @property
    def longest_ms(self) -> dict[str, float | None]:
        """The longest time of a sequence in each phase."""
        phases = ("queue", "prefill", "decode") if self.generates else ("queue", "prefill")
        names = [f"{phase}_ms" for phase in phases]
        return {name: max((getattr(timings, name) for timings in self.timings), default=None) for name in names}

    def fields(self) -> dict[str, Any]:
        """Return the fields of the log line."""
        counts = {
            "sequences": self.sequences,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "scored_tokens": self.scored_tokens,
            "user": self.user,
        }
        return {
            **{name: value for name, value in counts.items() if value is not None},
            "finish_reasons": self.finish_reasons,
            **self.longest_ms,
        }

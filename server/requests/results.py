"""What the engine's work comes to, in words of no dialect. Each dialect translates these to its own replies."""

from dataclasses import dataclass
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from model.scoring import Score
from server.protocol.messages import FinishReason, Timings


class OutputToken(Struct, frozen=True, gc=False):
    """One token of the output. `text` is what became certain with it, so the texts joined are the output.

    Among the most probable tokens it is a token that could have stood there, and `text` is that of its own bytes: part
    of a character is U+FFFD.
    """

    id: int
    text: str
    logprob: float | None  # nats, under the model's own distribution
    special: bool  # the model's own end of a text


class TopToken(Struct, frozen=True):
    """A token that could have stood there. Its `text` is that of its own bytes, so part of a character is U+FFFD."""

    id: int
    text: str
    logprob: float


class ScoredToken(Struct, frozen=True):
    """One token of a scored text. Its figures are null where nothing came before it, and absent if not asked for.

    `text` is what became certain with it, so the texts joined are the whole. Rank 0 is the model's first choice.
    """

    id: int
    text: str
    logprob: float | None = None  # nats
    rank: int | None = None
    top: list[TopToken] | UnsetType | None = UNSET  # most probable first
    entropy: float | UnsetType | None = UNSET  # nats
    memory_share: list[float] | UnsetType | None = UNSET  # of each layer


class Ending(Struct, frozen=True):
    """How a generated sequence went."""

    text: str  # the whole output
    finish_reason: FinishReason
    num_tokens: int
    num_prompt_tokens: int
    seed: int  # gives this sequence again, alone
    matched_stop: str | int | None  # the stop string, or the id of stop_token_ids
    logprob_sum: float
    timings: Timings
    fingerprint: str


class Output(Struct, frozen=True, gc=False):
    """What is new of a generated sequence. The last one has the `ending`.

    `token` is null where the output is of the prompt, and where the sequence ended between two tokens (cancelled,
    timeout, shutdown).
    """

    index: int  # tokens so far
    token: OutputToken | None = None
    top: list[OutputToken] | None = None  # the most probable tokens in its place, best first; if asked for
    ending: Ending | None = None
    prompt: list[ScoredToken] | None = None  # all of it; comes first, if asked for


class Generated(Struct, frozen=True):
    """A generated sequence as a whole."""

    ending: Ending
    tokens: list[OutputToken]
    tops: list[list[OutputToken]]  # of each token, if asked for
    prompt: list[ScoredToken] | None


class TextScore(Struct, frozen=True):
    """The figures of one text over its scored tokens."""

    figures: Score
    is_greedy: bool  # whether the model's first choice was the text's at every place


class ScoreOutput(Struct, frozen=True):
    """What is new of a scored sequence. The last one has the `score`."""

    num_done: int  # tokens scored so far
    num_tokens: int  # how many there will be
    tokens: list[ScoredToken]  # those that are new, if they are listed
    score: TextScore | None = None


@dataclass(frozen=True, kw_only=True)
class WorkSummary:
    """A request for the log and the traces: counts and times, no text. None is what does not apply or is not known."""

    sequences: int
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    scored_tokens: int | None = None
    finish_reasons: list[str]
    timings: list[Timings]  # of the sequences that have ended
    user: str | None = None

    @property
    def generates(self) -> bool:
        """Whether tokens were asked for, and not only scores."""
        return self.generated_tokens is not None

    @property
    def longest_ms(self) -> dict[str, float | None]:
        """The longest time of a sequence in each phase."""
        phases = ("queue", "prefill", "decode") if self.generates else ("queue", "prefill")
        names = [f"{phase}_ms" for phase in phases]
        return {name: max((getattr(one, name) for one in self.timings), default=None) for name in names}

    def fields(self) -> dict[str, Any]:
        """The fields of the line in the log."""
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

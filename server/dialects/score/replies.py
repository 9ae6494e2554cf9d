"""What POST /score says on success: typed structs that encode straight to JSON bytes. Knows no model and no HTTP."""

from msgspec import UNSET, Struct, UnsetType


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


class ScoreReply(Struct, frozen=True):
    """The figures of one text over its scored tokens; null where nothing was scored (or infinite)."""

    num_tokens: int
    num_bytes: int
    num_chars: int
    num_words: int
    logprob: float  # nats, sum
    perplexity: float | None  # per the unit that was asked for
    word_perplexity: float | None
    bits_per_token: float | None
    bits_per_byte: float | None
    bits_per_char: float | None
    is_greedy: bool  # whether the model's first choice was the text's at every place
    tokens: list[ScoredToken] | UnsetType = UNSET  # plain replies only


class ScoreEvent(Struct, frozen=True):
    """One event of a stream. The last one of a sequence has its `reply`."""

    index: int  # tokens scored so far
    num_tokens: int  # how many there will be
    sequence: int | UnsetType = UNSET  # which reply of a list, from 0; lists of lists are numbered through
    tokens: list[ScoredToken] | UnsetType = UNSET  # those that are new
    reply: ScoreReply | None = None

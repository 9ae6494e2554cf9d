"""What POST /score says on success: typed structs that encode straight to JSON bytes. Knows no model and no HTTP."""

from dataclasses import replace
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from server.requests.results import ScoredToken, ScoreOutput, TextScore

Unit = Literal["token", "byte", "char", "word"]


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


def score_reply(score: TextScore, *, unit: Unit) -> ScoreReply:
    """All figures of a text; `perplexity` is per the unit."""
    figures = score.figures
    num_units = {
        "token": figures.num_tokens,
        "byte": figures.num_bytes,
        "char": figures.num_chars,
        "word": figures.num_words,
    }[unit]
    return ScoreReply(
        num_tokens=figures.num_tokens,
        num_bytes=figures.num_bytes,
        num_chars=figures.num_chars,
        num_words=figures.num_words,
        logprob=figures.logprob,
        # As if each unit were a token: so it is the shared function that decides what a perplexity is.
        perplexity=replace(figures, num_tokens=num_units).perplexity,
        word_perplexity=figures.word_perplexity,
        bits_per_token=figures.bits_per_token,
        bits_per_byte=figures.bits_per_byte,
        bits_per_char=figures.bits_per_char,
        is_greedy=score.is_greedy,
    )


def score_event(output: ScoreOutput, *, unit: Unit, lists_tokens: bool, sequence: int | UnsetType) -> ScoreEvent:
    """The event of an output. sequence: the number that the event carries."""
    return ScoreEvent(
        output.num_done,
        output.num_tokens,
        sequence=sequence,
        tokens=output.tokens if lists_tokens else UNSET,
        reply=None if output.score is None else score_reply(output.score, unit=unit),
    )

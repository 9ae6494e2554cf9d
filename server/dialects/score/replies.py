"""The replies and events of POST /score. Knows no model and no HTTP."""

from dataclasses import replace
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from server.requests.results import ScoredToken, ScoreOutput, TextScore

Unit = Literal["token", "byte", "char", "word"]


class ScoreReply(Struct, frozen=True):
    """The score of one text over its scored tokens. A figure is null if nothing was scored or it is infinite."""

    num_tokens: int
    num_bytes: int
    num_chars: int
    num_words: int
    logprob: float  # the sum, in nats
    perplexity: float | None  # per `unit` of the request
    word_perplexity: float | None
    bits_per_token: float | None
    bits_per_byte: float | None
    bits_per_char: float | None
    is_greedy: bool  # whether each token of the text is the most probable token at its position
    tokens: list[ScoredToken] | UnsetType = UNSET  # plain replies only


class ScoreEvent(Struct, frozen=True):
    """One event of a stream. The last event of a sequence has its `reply`."""

    index: int  # tokens scored so far
    num_tokens: int  # tokens to score in all
    sequence: int | UnsetType = UNSET  # index in the list of replies, from 0; lists of lists are counted as one list
    tokens: list[ScoredToken] | UnsetType = UNSET  # the new tokens
    reply: ScoreReply | None = None


def score_reply(score: TextScore, *, unit: Unit) -> ScoreReply:
    """Return all figures of a text; `perplexity` is per `unit`."""
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
        # The units take the place of the tokens, so the shared function defines the perplexity.
        perplexity=replace(figures, num_tokens=num_units).perplexity,
        word_perplexity=figures.word_perplexity,
        bits_per_token=figures.bits_per_token,
        bits_per_byte=figures.bits_per_byte,
        bits_per_char=figures.bits_per_char,
        is_greedy=score.is_greedy,
    )


def score_event(output: ScoreOutput, *, unit: Unit, lists_tokens: bool, sequence: int | UnsetType) -> ScoreEvent:
    """Return the event of an output. sequence: the index that the event carries."""
    return ScoreEvent(
        output.num_done,
        output.num_tokens,
        sequence=sequence,
        tokens=output.tokens if lists_tokens else UNSET,
        reply=None if output.score is None else score_reply(output.score, unit=unit),
    )

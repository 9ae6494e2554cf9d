"""The special tokens that other programs expect of a tokenizer: its own, or harmless stand-ins."""

from dataclasses import dataclass

from model.tokenizer import Tokenizer
from server.requests.token_list import token_name

NEW_LINE = "\n"
END_OF_TEXT = "\x03"  # an ASCII control character that no text has, so a program that stops at it cuts nothing off


@dataclass(frozen=True)
class SpecialToken:
    """A token with its text and its id. The id is never 0, which programs take for a missing id."""

    text: str
    id: int


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that begin and end a text.

    The tokenizer's end-of-text token is both, if it has one: in training it stood before each text but the first.
    Otherwise a line end begins a text.
    """

    bos: SpecialToken
    eos: SpecialToken
    are_stand_ins: bool  # whether the tokenizer itself has no such tokens

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialTokens":
        """Return the special tokens of a tokenizer."""
        if tokenizer.eos_id:
            end = SpecialToken(token_name(tokenizer, tokenizer.eos_id), tokenizer.eos_id)
            return cls(end, end, are_stand_ins=False)
        bos, eos = (_stand_in(tokenizer, preferred) for preferred in (NEW_LINE, END_OF_TEXT))
        return cls(bos, eos, are_stand_ins=True)

    def encode(self, text: str) -> list[int] | None:
        """Return the ids of a text that is exactly a special token, else None. Programs request the ids this way."""
        return next(([token.id] for token in (self.bos, self.eos) if token.text == text), None)


def _stand_in(tokenizer: Tokenizer, preferred: str) -> SpecialToken:
    """Return the first text that is a single token with an id other than 0."""
    names = (token_name(tokenizer, token) for token in range(1, tokenizer.vocab_size))
    for text in (preferred, *names):
        ids = tokenizer.encode(text)
        if len(ids) == 1 and ids[0] != 0:
            return SpecialToken(text, ids[0])
    raise AssertionError("every tokenizer has a token with an id other than 0")

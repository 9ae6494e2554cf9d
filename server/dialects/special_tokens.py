"""The tokens that other programs expect every tokenizer to have: real ones, or stand-ins that do no harm."""

from dataclasses import dataclass

from model.tokenizer import Tokenizer
from server.requests.token_list import token_name

NEW_LINE = "\n"
END_OF_TEXT = "\x03"  # ASCII's; in no text, so that who stops at it cuts nothing off


@dataclass(frozen=True)
class SpecialToken:
    """A token by its text and its id, which is never 0: programs take that for none."""

    text: str
    id: int


@dataclass(frozen=True)
class SpecialTokens:
    """What begins a text, and what ends it.

    Where the tokenizer has an end, it is both: it is what stood before each text but the first in training. Else a text
    begins as after a line end.
    """

    bos: SpecialToken
    eos: SpecialToken
    are_stand_ins: bool  # whether the tokenizer knows no such tokens

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialTokens":
        """Those of a tokenizer."""
        if tokenizer.eos_id:
            end = SpecialToken(token_name(tokenizer, tokenizer.eos_id), tokenizer.eos_id)
            return cls(end, end, are_stand_ins=False)
        bos, eos = (_stand_in(tokenizer, preferred) for preferred in (NEW_LINE, END_OF_TEXT))
        return cls(bos, eos, are_stand_ins=True)

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text that is one of them and nothing else, for that is how their ids are asked for."""
        return next(([one.id] for one in (self.bos, self.eos) if one.text == text), None)


def _stand_in(tokenizer: Tokenizer, preferred: str) -> SpecialToken:
    """The first text that is one token, not of id 0."""
    names = (token_name(tokenizer, token) for token in range(1, tokenizer.vocab_size))
    for text in (preferred, *names):
        ids = tokenizer.encode(text)
        if len(ids) == 1 and ids[0] != 0:
            return SpecialToken(text, ids[0])
    raise AssertionError("every tokenizer has a token of another id than 0")

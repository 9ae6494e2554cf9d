"""Lists of tokens and log-probabilities in OpenAI's format: token names and offsets in the text. Knows no request."""

from collections.abc import Sequence

from model.tokenizer import StreamingDecoder, Tokenizer
from server.dialects.openai.replies import Logprobs
from server.requests.results import OutputToken, ScoredToken, TopToken
from server.requests.token_list import token_name


class LogprobLister:
    """Maker of the lists of one text from its tokens."""

    def __init__(self, tokenizer: Tokenizer, *, offset: int = 0) -> None:
        """offset: characters before the text."""
        self._tokenizer = tokenizer
        self._decoder = StreamingDecoder(tokenizer)
        self._end = offset  # of the text that is certain so far, in characters
        self._lists = Logprobs([], [], [], [])

    def add(self, token: OutputToken | ScoredToken, *, top: Sequence[OutputToken | TopToken]) -> None:
        """Add a token. `top`: the most probable tokens at its position. The logprob of a text's first token is None."""
        self._lists.tokens.append(token_name(self._tokenizer, token.id))
        self._lists.token_logprobs.append(token.logprob)
        self._lists.top_logprobs.append(None if token.logprob is None else self._by_name([*top, token]))
        self._lists.text_offset.append(self._begin(token.id))

    def take(self) -> Logprobs:
        """Return the entries added since the last call."""
        taken, self._lists = self._lists, Logprobs([], [], [], [])
        return taken

    def _by_name(self, top: Sequence[OutputToken | TopToken | ScoredToken]) -> dict[str, float]:
        return {token_name(self._tokenizer, token.id): token.logprob for token in top if token.logprob is not None}

    def _begin(self, token: int) -> int:
        """Return the offset of a token; a token that begins within a character has the character's offset."""
        before = self._end
        self._end += len(self._decoder.add(token))
        data = self._tokenizer.token_bytes(token)
        try:
            return self._end - len(data.decode())  # whole characters: the text up to the token's end is certain
        except UnicodeDecodeError:
            return before


def joined(first: Logprobs, second: Logprobs) -> Logprobs:
    """Return lists with the entries of both."""
    return Logprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )

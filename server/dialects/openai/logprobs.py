"""Tokens and their log-probabilities as OpenAI lists them: by name, and by place in the text. Knows no request."""

from collections.abc import Sequence

from model.tokenizer import StreamingDecoder, Tokenizer
from server.dialects.openai.replies import Logprobs
from server.requests.results import OutputToken, ScoredToken, TopToken
from server.requests.token_list import token_name


class LogprobLister:
    """The lists of one text as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, *, offset: int = 0) -> None:
        """offset: characters before the text."""
        self._tokenizer = tokenizer
        self._decoder = StreamingDecoder(tokenizer)
        self._end = offset  # of what is certain so far
        self._lists = Logprobs([], [], [], [])

    def add(self, token: OutputToken | ScoredToken, *, top: Sequence[OutputToken | TopToken]) -> None:
        """One more token, with the most probable ones in its place; its logprob is None where nothing came before."""
        self._lists.tokens.append(token_name(self._tokenizer, token.id))
        self._lists.token_logprobs.append(token.logprob)
        self._lists.top_logprobs.append(None if token.logprob is None else self._by_name([*top, token]))
        self._lists.text_offset.append(self._begin(token.id))

    def take(self) -> Logprobs:
        """The entries that are new since the last call."""
        taken, self._lists = self._lists, Logprobs([], [], [], [])
        return taken

    def _by_name(self, top: Sequence[OutputToken | TopToken | ScoredToken]) -> dict[str, float]:
        return {token_name(self._tokenizer, one.id): one.logprob for one in top if one.logprob is not None}

    def _begin(self, token: int) -> int:
        """Where the token begins; for one that begins within a character, where that does."""
        before = self._end
        self._end += len(self._decoder.add(token))
        data = self._tokenizer.token_bytes(token)
        try:
            return self._end - len(data.decode())  # a whole text: all of it is certain now, after what was begun before
        except UnicodeDecodeError:
            return before


def joined(first: Logprobs, second: Logprobs) -> Logprobs:
    """The entries of both."""
    return Logprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )

"""From `inputs` to token ids: the one place of the server where text is tokenised and ids are checked.

Work in proportion to the inputs, in short steps, so that a thread can do it beside the event loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from model.tokenizer import Tokenizer, TokenizerError, encode_corpus
from server.errors import InvalidField

InputsValue = str | list[str] | list[int] | list[list[int]]
STRIDE = 1 << 16  # ids converted at a time; longer would keep the interpreter from the event loop


@dataclass(frozen=True)
class Prompt:
    """One input: its ids, at least one."""

    tokens: NDArray[np.int32]
    text: str | None  # None where the client gave ids


def is_list_of_inputs(inputs: InputsValue) -> bool:
    """Whether the answer is an array: a text is one input, and so is a list of ids."""
    return isinstance(inputs, list) and not isinstance(inputs[0], int)


def num_inputs(inputs: InputsValue) -> int:
    """Number of sequences a request asks for."""
    return len(inputs) if is_list_of_inputs(inputs) else 1


def read_prompts(inputs: InputsValue, *, field: str, tokenizer: Tokenizer) -> list[Prompt]:
    """One prompt for each input, in order.

    Raises:
        InvalidField: an input is empty or holds an unknown id.
    """
    if not is_list_of_inputs(inputs):
        return [read_prompt(cast("str | list[int]", inputs), field=field, tokenizer=tokenizer)]
    several = cast("list[str | list[int]]", inputs)
    return [read_prompt(one, field=f"{field}.{i}", tokenizer=tokenizer) for i, one in enumerate(several)]


def read_prompt(one: str | list[int], *, field: str, tokenizer: Tokenizer) -> Prompt:
    """A single text or list of ids. Raises InvalidField, naming `field`."""
    if isinstance(one, str):
        try:
            prompt = Prompt(encode_corpus(tokenizer, one).astype(np.int32), one)
        except TokenizerError as error:
            raise InvalidField(f"{field}: {error}", param=field) from None
    else:
        prompt = Prompt(read_ids(one, field=field, tokenizer=tokenizer), None)
    if not len(prompt.tokens):
        raise InvalidField.of(field, value=one, allowed="it should hold at least one token")
    return prompt


def read_ids(ids: Sequence[int], *, field: str, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """The ids as an array. Raises InvalidField where one is not the tokenizer's, naming its place in `field`."""
    parts = [np.asarray(ids[i : i + STRIDE], dtype=np.int32) for i in range(0, len(ids), STRIDE)]
    array = np.concatenate([np.empty(0, dtype=np.int32), *parts])
    unknown = np.flatnonzero(array >= tokenizer.vocab_size)
    if len(unknown):
        place = int(unknown[0])
        check_id(ids[place], field=f"{field}.{place}", tokenizer=tokenizer)
    return array


def check_id(token: int, *, field: str, tokenizer: Tokenizer) -> None:
    """Raise InvalidField where the id is not one of the tokenizer's."""
    if token >= tokenizer.vocab_size:
        raise InvalidField.of(field, value=token, allowed=f"token ids are 0 to {tokenizer.vocab_size - 1}")

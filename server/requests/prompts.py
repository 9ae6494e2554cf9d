"""Tokenises texts and checks token ids; no other module of the server does either.

The work is linear in the inputs and done in short steps, so a thread can do it without stalling the event loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from model.tokenizer import Tokenizer, TokenizerError, encode_corpus
from server.errors import InvalidField

InputsValue = str | list[str] | list[int] | list[list[int]]
STRIDE = 1 << 16  # ids converted at a time; a longer step would keep the interpreter's lock from the event loop


@dataclass(frozen=True)
class Prompt:
    """One input as token ids, at least one."""

    tokens: NDArray[np.int32]
    text: str | None  # None if the client sent ids


def is_list_of_inputs(inputs: InputsValue) -> bool:
    """Whether `inputs` is a list of inputs; a text or a list of ids is a single input."""
    return isinstance(inputs, list) and not isinstance(inputs[0], int)


def num_inputs(inputs: InputsValue) -> int:
    """Return the number of inputs."""
    return len(inputs) if is_list_of_inputs(inputs) else 1


def read_prompts(inputs: InputsValue, *, field: str, tokenizer: Tokenizer) -> list[Prompt]:
    """Return a prompt for each input, in order.

    Raises:
        InvalidField: an input is empty or holds an unknown id.
    """
    if not is_list_of_inputs(inputs):
        return [read_prompt(cast("str | list[int]", inputs), field=field, tokenizer=tokenizer)]
    several = cast("list[str | list[int]]", inputs)
    return [read_prompt(value, field=f"{field}.{i}", tokenizer=tokenizer) for i, value in enumerate(several)]


def read_prompt(value: str | list[int], *, field: str, tokenizer: Tokenizer) -> Prompt:
    """Return the prompt of a text or a list of ids. Raises InvalidField, naming `field`."""
    if isinstance(value, str):
        try:
            prompt = Prompt(encode_corpus(tokenizer, value).astype(np.int32), value)
        except TokenizerError as error:
            raise InvalidField(f"{field}: {error}", param=field) from None
    else:
        prompt = Prompt(read_ids(value, field=field, tokenizer=tokenizer), None)
    if not len(prompt.tokens):
        raise InvalidField.of(field, value=value, allowed="it should hold at least one token")
    return prompt


def read_ids(ids: Sequence[int], *, field: str, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Return the ids as an array. Raises InvalidField, naming the position in `field`, if the tokenizer lacks an id."""
    parts = [np.asarray(ids[i : i + STRIDE], dtype=np.int32) for i in range(0, len(ids), STRIDE)]
    array = np.concatenate([np.empty(0, dtype=np.int32), *parts])
    unknown = np.flatnonzero(array >= tokenizer.vocab_size)
    if len(unknown):
        position = int(unknown[0])
        check_id(ids[position], field=f"{field}.{position}", tokenizer=tokenizer)
    return array


def check_id(token: int, *, field: str, tokenizer: Tokenizer) -> None:
    """Raise InvalidField if the tokenizer has no such id."""
    if token >= tokenizer.vocab_size:
        raise InvalidField.of(field, value=token, allowed=f"token ids are 0 to {tokenizer.vocab_size - 1}")

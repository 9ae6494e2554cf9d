"""From `inputs` to token ids: the one place of the server where text is tokenised and ids are checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from model.tokenizer import Tokenizer, TokenizerError
from server.errors import InvalidField
from server.schemas import InputsValue


@dataclass(frozen=True)
class Prompt:
    """One input: its ids, at least one."""

    tokens: list[int]
    text: str | None  # None where the client gave ids


def is_list_of_inputs(inputs: InputsValue) -> bool:
    """Whether the answer is an array: a text is one input, and so is a list of ids."""
    return isinstance(inputs, list) and not isinstance(inputs[0], int)


def read_prompts(inputs: InputsValue, *, tokenizer: Tokenizer) -> list[Prompt]:
    """One prompt for each input, in order. Work in proportion to the length of the inputs: see `beside_the_loop`.

    Raises:
        InvalidField: an input is empty or holds an unknown id.
    """
    if not is_list_of_inputs(inputs):
        return [read_prompt(cast("str | list[int]", inputs), field="inputs", tokenizer=tokenizer)]
    several = cast("list[str] | list[list[int]]", inputs)
    return [read_prompt(one, field=f"inputs.{i}", tokenizer=tokenizer) for i, one in enumerate(several)]


def read_prompt(one: str | Sequence[int], *, field: str, tokenizer: Tokenizer) -> Prompt:
    """A single text or list of ids. Raises InvalidField, naming `field`."""
    if isinstance(one, str):
        try:
            prompt = Prompt(tokenizer.encode(one), one)
        except TokenizerError as error:
            raise InvalidField(f"{field}: {error}", param=field) from None
    else:
        check_ids(one, field=field, tokenizer=tokenizer)
        prompt = Prompt(list(one), None)
    if not prompt.tokens:
        raise InvalidField.of(field, value=one, allowed="it should hold at least one token")
    return prompt


def check_ids(ids: Sequence[int], *, field: str, tokenizer: Tokenizer) -> None:
    """Raise InvalidField where an id is not one of the tokenizer's."""
    unknown = np.flatnonzero(np.asarray(ids, dtype=np.int64) >= tokenizer.vocab_size)
    if len(unknown):
        place = int(unknown[0])
        check_id(ids[place], field=f"{field}.{place}", tokenizer=tokenizer)


def check_id(token: int, *, field: str, tokenizer: Tokenizer) -> None:
    """Raise InvalidField where the id is not one of the tokenizer's."""
    if token >= tokenizer.vocab_size:
        raise InvalidField.of(field, value=token, allowed=f"token ids are 0 to {tokenizer.vocab_size - 1}")


def num_inputs(inputs: InputsValue) -> int:
    """Number of sequences a request asks for."""
    return len(inputs) if is_list_of_inputs(inputs) else 1

"""The types of fields that several dialects share: inputs, token ids, prefixes. Knows no model."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

MAX_TOP = 20  # most probable tokens to tell beside each one

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


def _form_of_inputs(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else None
    return {str: "texts", int: "ids", list: "batch"}.get(type(first))


Inputs = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(fail_fast=True), Tag("texts")]
    | Annotated[list[TokenId], Field(fail_fast=True), Tag("ids")]
    | Annotated[list[Annotated[list[TokenId], Field(fail_fast=True)]], Field(fail_fast=True), Tag("batch")],
    Discriminator(
        _form_of_inputs,
        custom_error_type="inputs",
        custom_error_message="it should be a text, a list of token ids, or a list of one or more of either",
    ),
    Field(description="a text or a list of token ids; or a list of either, answered by an array in the same order"),
]

Prefix = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")] | Annotated[TokenId, Tag("id")],
    Discriminator(
        lambda value: {str: "text", int: "id"}.get(type(value)),
        custom_error_type="prefix",
        custom_error_message="it should be a text or a token id",
    ),
]

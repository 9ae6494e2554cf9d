"""The body of POST /score. Knows no model, so ids and `top` are checked against the vocabulary later."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from server.dialects.inputs import MAX_TOP, Inputs, Prefix
from server.dialects.score.replies import Unit
from server.protocol.messages import Extras
from server.requests.prompts import is_list_of_inputs, num_inputs
from server.web.body import FieldError, RequestId, TimeoutS
from server.web.engine_request import EngineRequest

MAX_CONTINUATIONS = 1024  # of one input
Texts = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CONTINUATIONS)
]  # for the description only, see `_read_continuations`


def _read_continuations(value: Any) -> list[str] | list[list[str]]:
    """Validate by hand: pydantic would report the union members that it tried, and not just the wrong entry."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        for i, texts in enumerate(value):
            _check_texts(texts, path=(str(i),))
    else:
        _check_texts(value, path=())
    return value  # type: ignore[no-any-return]


def _check_texts(texts: Any, *, path: tuple[str, ...]) -> None:
    allowed = f"it should be a list of 1 to {MAX_CONTINUATIONS} texts"
    if not isinstance(texts, list):
        raise FieldError.of(".".join(path), value=texts, allowed=allowed)
    if not 1 <= len(texts) <= MAX_CONTINUATIONS:
        raise FieldError(".".join(path), f"a list of {len(texts)} is not allowed; {allowed}")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            subpath = ".".join((*path, str(i)))
            raise FieldError.of(subpath, value=text, allowed="it should be a text of at least one character")


Continuations = Annotated[
    list[str] | list[list[str]], PlainValidator(_read_continuations, json_schema_input_type=Texts | list[Texts])
]


class ScoreRequest(EngineRequest):
    """Body of POST /score."""

    inputs: Inputs
    continuations: Continuations | None = Field(
        default=None,
        description="texts to score, each as if it alone followed the input, which is read once and not scored; for a "
        "list of inputs, a list of such lists. Input and continuation are tokenised separately, as in lm_eval",
    )
    prefix: Prefix | None = Field(
        default=None,
        description="a text or a token id that is read before each input and not scored; it gives the input's first "
        "token a score",
    )
    unit: Unit = Field(default="token", description="the unit of `perplexity`; no other figure depends on it")
    return_: list[Literal["tokens", "top", "entropy", "memory_share"]] = Field(
        default=[],
        alias="return",
        max_length=4,
        fail_fast=True,
        description="tokens: list every token with its figures; added to each token: "
        "top: the most probable tokens at its position, "
        "entropy: that of the distribution it was scored under, in nats, "
        "memory_share: how much of the attention at the position before went to persistent vectors, by layer",
    )
    top: int = Field(default=5, ge=1, le=MAX_TOP, description="how many tokens `return: [top]` lists")
    stream: bool = Field(default=False, description="respond with server-sent events as the scores come")
    timeout_s: TimeoutS | None = Field(
        default=None, description="seconds after which the request fails (408); the server's limit if not set"
    )
    request_id: RequestId = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "top" in self.model_fields_set and "top" not in self.return_:
            raise FieldError.of("top", value=self.top, allowed="it goes with `return: [top]` only")
        if self.continuations is None:
            return self
        is_nested = isinstance(self.continuations[0], list)
        if is_nested != is_list_of_inputs(self.inputs):
            allowed = "one input takes a list of texts" if is_nested else "a list of inputs takes a list of lists"
            raise FieldError.of("continuations", value=self.continuations, allowed=allowed)
        if is_nested and len(self.continuations) != num_inputs(self.inputs):
            raise FieldError(
                "continuations",
                f"{len(self.continuations)} lists are not allowed; it should be one for each of the "
                f"{num_inputs(self.inputs)} inputs",
            )
        return self

    @property
    def depth(self) -> int:
        """Depth of the reply's arrays: 0 one reply; 1 an array, of inputs or of continuations; 2 an array of arrays."""
        return is_list_of_inputs(self.inputs) + (self.continuations is not None)

    @property
    def num_sequences(self) -> int:
        """Number of texts to score, each a sequence."""
        if self.continuations is None:
            return num_inputs(self.inputs)
        return sum(1 if isinstance(texts, str) else len(texts) for texts in self.continuations)

    @property
    def counted_field(self) -> str:
        """Name of the field that sets the number of sequences, for error messages."""
        return "inputs" if self.continuations is None else "continuations"

    @property
    def extras(self) -> Extras:
        """The extra figures that the engine reports of each token."""
        return Extras(
            num_top=self.top if "top" in self.return_ else 0,
            entropy="entropy" in self.return_,
            memory_share="memory_share" in self.return_,
        )

"""What a client may say to POST /score. Knows no model, so ids and `top` are checked against the vocabulary later."""

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
    """Check by hand, for pydantic would name the forms that it tried where only the place of the fault matters."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        for i, texts in enumerate(value):
            _check_texts(texts, place=(str(i),))
    else:
        _check_texts(value, place=())
    return value  # type: ignore[no-any-return]


def _check_texts(texts: Any, *, place: tuple[str, ...]) -> None:
    allowed = f"it should be a list of 1 to {MAX_CONTINUATIONS} texts"
    if not isinstance(texts, list):
        raise FieldError.of(".".join(place), value=texts, allowed=allowed)
    if not 1 <= len(texts) <= MAX_CONTINUATIONS:
        raise FieldError(".".join(place), f"a list of {len(texts)} is not allowed; {allowed}")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            where = ".".join((*place, str(i)))
            raise FieldError.of(where, value=text, allowed="it should be a text of at least one character")


Continuations = Annotated[
    list[str] | list[list[str]], PlainValidator(_read_continuations, json_schema_input_type=Texts | list[Texts])
]


class ScoreRequest(EngineRequest):
    """Body of POST /score."""

    inputs: Inputs
    continuations: Continuations | None = Field(
        default=None,
        description="texts to score, each as if it alone followed the input, which is read once and not scored; for a "
        "list of inputs a list of such lists. Input and continuation are tokenised each on its own, as lm_eval does",
    )
    prefix: Prefix | None = Field(
        default=None,
        description="a text or a token id that is read before each input and not scored, so that the input's first "
        "token has a score",
    )
    unit: Unit = Field(default="token", description="what `perplexity` is per; all other figures stay as they are")
    return_: list[Literal["tokens", "top", "entropy", "memory_share"]] = Field(
        default=[],
        alias="return",
        max_length=4,
        fail_fast=True,
        description="tokens: every token's own figures; with each of them, "
        "top: the most probable tokens in its place, "
        "entropy: that of the distribution it was scored under, in nats, "
        "memory_share: how much of the attention at the position before went to persistent vectors, by layer",
    )
    top: int = Field(default=5, ge=1, le=MAX_TOP, description="how many tokens `return: [top]` tells")
    stream: bool = Field(default=False, description="answer with server-sent events as the scores come")
    timeout_s: TimeoutS | None = Field(
        default=None, description="seconds after which the request is given up (408); the server's own if not set"
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
        """0: the answer is one reply; 1: an array, of inputs or of continuations; 2: an array of arrays."""
        return is_list_of_inputs(self.inputs) + (self.continuations is not None)

    @property
    def num_sequences(self) -> int:
        """How many texts there are to score, each a sequence of its own."""
        if self.continuations is None:
            return num_inputs(self.inputs)
        return sum(1 if isinstance(one, str) else len(one) for one in self.continuations)

    @property
    def counted_field(self) -> str:
        """What asks for so many."""
        return "inputs" if self.continuations is None else "continuations"

    @property
    def extras(self) -> Extras:
        """What the engine shall tell of each token."""
        return Extras(
            num_top=self.top if "top" in self.return_ else 0,
            entropy="entropy" in self.return_,
            memory_share="memory_share" in self.return_,
        )

"""What a client may say to POST /generate. Knows no model, so ids are checked later."""

import re
import secrets
from typing import Annotated, Any, Self

from pydantic import Field, PlainValidator, model_validator

from server.dialects.inputs import Inputs, RequestId, TimeoutS, TokenId
from server.errors import InvalidField, shorten
from server.web.body import RequestBody

MAX_STOP_CHARS = 65536  # of all stop strings together; building their automaton takes about 1 us a character
MAX_IDS = 1024  # in stop_token_ids and in logit_bias
MAX_BIAS = 100
MAX_TOP = 20
MAX_N = 8
MAX_BEST_OF = 16
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p")  # giving one asks for sampling

_ID = re.compile(r"0|[1-9][0-9]{0,9}")  # one spelling for each id, so that no two keys can mean the same


def _read_bias(value: Any) -> dict[int, float]:
    """Checked by hand, so that a thousand faults give one complaint, with the place and the whole range."""
    if not isinstance(value, dict):
        raise InvalidField.of("parameters.logit_bias", value=value, allowed="it should be an object, by token id")
    if len(value) > MAX_IDS:
        raise InvalidField(
            f"parameters.logit_bias: {len(value)} entries are not allowed; at most {MAX_IDS}",
            param="parameters.logit_bias",
        )
    for key, bias in value.items():
        field = f"parameters.logit_bias.{shorten(str(key))}"
        if not _ID.fullmatch(str(key)):
            raise InvalidField.of(field, value=key, allowed="it should be a token id, digits without leading zeros")
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:  # NaN is in no range
            allowed = f"it should be at least {-MAX_BIAS} and at most {MAX_BIAS}"
            raise InvalidField.of(field, value=bias, allowed=allowed)
    return {int(key): float(bias) for key, bias in value.items()}


LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_read_bias, json_schema_input_type=dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]]),
]


class Parameters(RequestBody):
    """How to continue. Greedy unless temperature, top_k, top_p, min_p or typical_p is given or do_sample is true.

    Null means "not given", except for max_new_tokens.
    """

    max_new_tokens: int | None = Field(
        default=128, ge=1, le=2**31 - 1, description="null = until something else ends it, for streams only"
    )
    min_new_tokens: int = Field(
        default=0, ge=0, le=2**31 - 1, description="nothing ends the output before: no end id, no text of `stop`"
    )
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="0 = greedy; 1 where sampling and not given"
    )
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1, description="keep the k most probable tokens; 0 = off")
    top_p: float | None = Field(default=None, gt=0, le=1, description="keep the most probable tokens up to this share")
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="keep tokens of at least this share of the best one"
    )
    typical_p: float | None = Field(
        default=None, gt=0, le=1, description="keep the tokens of most typical surprise up to this share"
    )
    repetition_penalty: float = Field(
        default=1, gt=0, description="divides (below 0 multiplies) logits of tokens seen in prompt or output; 1 = off"
    )
    frequency_penalty: float = Field(
        default=0, ge=-2, le=2, description="taken off a token's logit for each time it is in the output"
    )
    presence_penalty: float = Field(
        default=0, ge=-2, le=2, description="taken off a token's logit once it is in the output"
    )
    logit_bias: LogitBias | None = Field(
        default=None, description=f'added to logits, by token id ("17"); at most {MAX_IDS} entries'
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=2**64 - 1,
        description="drawn where not given; of several sequences the next has seed + 1; reported in details",
    )
    do_sample: bool | None = Field(default=None, description="true samples at temperature 1 unless another is given")
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None, fail_fast=True, description="texts that end the output; they are not part of it"
    )
    stop_token_ids: list[TokenId] | None = Field(
        default=None, max_length=MAX_IDS, fail_fast=True, description="ids that end the output, without their text"
    )
    ignore_eos: bool = Field(default=False, description="go on after the model's own end")
    n: int = Field(default=1, ge=1, le=MAX_N, description="continuations of each input; more than 1 are an array")
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BEST_OF,
        description="sequences to generate, of which the n with the highest mean log-probability are returned, best "
        "first; plain replies only; n where not given",
    )
    return_full_text: bool = Field(default=False, description="begin generated_text with the prompt")
    truncate: int | None = Field(default=None, ge=1, description="read only the last n tokens of the prompt")
    details: bool = Field(default=False, description="add details to a plain reply; a stream always ends with them")
    decoder_input_details: bool = Field(default=False, description="add the prompt's tokens to the details")
    top_n_tokens: int = Field(
        default=0, ge=0, le=MAX_TOP, description="tell so many of the most probable tokens beside each one"
    )
    logprobs: bool = Field(
        default=True, description="false leaves `logprob` of generated tokens null, for readers that do not want it"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_sampling()
        self._check_lengths()
        return self

    def _check_sampling(self) -> None:
        asked = [name for name in SAMPLING_FIELDS if getattr(self, name) is not None]
        if self.do_sample is False and asked:
            raise _refusal(self, "do_sample", f"{asked[0]} asks for sampling, leave one of them out")
        if self.do_sample and self.temperature == 0:
            raise _refusal(self, "do_sample", "temperature 0 is greedy, leave one of them out")
        if self.best_of is not None and self.best_of < self.n:
            raise _refusal(self, "best_of", f"it should be at least n, which is {self.n}")
        if self.num_sequences > 1 and self.is_greedy:
            name = "n" if self.n > 1 else "best_of"
            raise _refusal(self, name, "greedy sequences would all be equal; do_sample: true makes them differ")

    def _check_lengths(self) -> None:
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            allowed = f"it should be at most max_new_tokens, which is {self.max_new_tokens}"
            raise _refusal(self, "min_new_tokens", allowed)
        if sum(map(len, self.stop or ())) > MAX_STOP_CHARS:
            raise _refusal(self, "stop", f"at most {MAX_STOP_CHARS} characters in all")

    def check_reply(self, *, stream: bool) -> None:
        """Refuse what this kind of reply cannot hold, for it would be ignored. Raises InvalidField."""
        if stream:
            if self.num_sequences > self.n:
                raise _refusal(self, "best_of", "the best of several is known at their end only, leave out stream")
            return
        if self.max_new_tokens is None:
            raise _refusal(self, "max_new_tokens", "no limit is for streams only")
        only_in_details = {
            "decoder_input_details": self.decoder_input_details,
            "top_n_tokens": self.top_n_tokens > 0,
            "logprobs": "logprobs" in self.model_fields_set,
        }
        for name, asked in only_in_details.items():
            if asked and not self.details:
                raise _refusal(self, name, "it is part of the details, ask for them with details: true")

    @property
    def is_greedy(self) -> bool:
        """The one documented rule."""
        if self.temperature is not None:
            return self.temperature == 0
        return not self.do_sample and all(getattr(self, name) is None for name in SAMPLING_FIELDS)

    @property
    def num_sequences(self) -> int:
        """How many are generated for each input."""
        return self.n if self.best_of is None else self.best_of

    def draw_seed(self) -> int:
        """The seed of the first sequence: the client's, or a new one.

        A new one, and those that follow it, are below 2^53, so that they survive readers that hold doubles.
        """
        return secrets.randbelow(2**53 - MAX_BEST_OF) if self.seed is None else self.seed


def _refusal(parameters: Parameters, name: str, allowed: str) -> InvalidField:
    return InvalidField.of(f"parameters.{name}", value=getattr(parameters, name), allowed=allowed)


class GenerateRequest(RequestBody):
    """Body of POST /generate."""

    inputs: Inputs
    parameters: Parameters = Parameters()
    stream: bool = Field(default=False, description="answer with server-sent events, one a token")
    timeout_s: TimeoutS | None = Field(
        default=None, description="seconds after which the output ends as it is; the server's own limit if not set"
    )
    request_id: RequestId | None = Field(
        default=None, description="the request's name, for DELETE /requests/{id}; wins over the header X-Request-Id"
    )

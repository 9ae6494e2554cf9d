"""The sampling fields of a request: the one wire definition, which every dialect that generates inherits.

`model.sampling.params` says what the parameters mean to the model. The command line, the form of the page and the
documentation are derived from the fields here. Knows no model, so token ids are checked later, in `plan`.
"""

import re
import secrets
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, PlainValidator, model_validator

from model.sampling.params import SamplingParams
from model.tokenizer import Tokenizer
from server.dialects.inputs import TokenId
from server.errors import InvalidField, shorten
from server.protocol.messages import Extras
from server.requests.output_text import StopStrings
from server.requests.plan import UNLIMITED, GenerationPlan
from server.requests.prompts import Prompt, check_id, read_ids
from server.web.body import FieldError, RequestBody

MAX_STOP_CHARS = 65536  # of all stop strings together; building their automaton takes about 1 us a character
MAX_IDS = 1024  # in stop_token_ids and in logit_bias
MAX_BIAS = 100
MAX_N = 8
MAX_BEST_OF = 16

_ID = re.compile(r"0|[1-9][0-9]{0,9}")  # one spelling for each id, so that no two keys can mean the same


def _read_bias(value: Any) -> dict[int, float]:
    """Check by hand, so that a thousand faults give one complaint, with the place and the whole range."""
    if not isinstance(value, dict):
        raise FieldError.of("", value=value, allowed="it should be an object, by token id")
    if len(value) > MAX_IDS:
        raise FieldError("", f"{len(value)} entries are not allowed; at most {MAX_IDS}")
    for key, bias in value.items():
        place = shorten(str(key))
        if not _ID.fullmatch(str(key)):
            raise FieldError.of(place, value=key, allowed="it should be a token id, digits without leading zeros")
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:  # NaN is in no range
            raise FieldError.of(place, value=bias, allowed=f"it should be at least {-MAX_BIAS} and at most {MAX_BIAS}")
    return {int(key): float(bias) for key, bias in value.items()}


LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_read_bias, json_schema_input_type=dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]]),
]
Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True)]


class FilterFields(RequestBody):
    """The fields that make a draw of each token: giving one of them asks for sampling. Null means "not given"."""

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

    @property
    def given_filters(self) -> list[str]:
        """Names of the fields that ask for sampling."""
        return [name for name in FilterFields.model_fields if getattr(self, name) is not None]


class SamplingFields(FilterFields):
    """All fields that say how tokens are drawn and what ends the output, the lengths excepted."""

    path: ClassVar[str] = ""  # where these fields stand in the body, with a dot at its end
    min_field: ClassVar[str]  # names of the fields that the dialects call differently
    max_field: ClassVar[str]
    top_field: ClassVar[str]

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
        description="drawn where not given; of several sequences the next has seed + 1",
    )
    stop: Stop | None = Field(default=None, description="texts that end the output; they are not part of it")
    stop_token_ids: list[TokenId] | None = Field(
        default=None, max_length=MAX_IDS, fail_fast=True, description="ids that end the output, without their text"
    )
    ignore_eos: bool = Field(default=False, description="go on after the model's own end")
    n: int = Field(default=1, ge=1, le=MAX_N, description="continuations of each input, those of the first input first")
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BEST_OF,
        description="sequences to generate, of which the n with the highest mean log-probability are returned, best "
        "first; plain replies only; n where not given",
    )

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken at every place."""
        raise NotImplementedError

    @property
    def num_generated(self) -> int:
        """How many sequences are generated for each input."""
        return self.n if self.best_of is None else self.best_of

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise self.fault("best_of", f"it should be at least n, which is {self.n}")
        least, most = getattr(self, self.min_field), getattr(self, self.max_field)
        if most is not None and least > most:
            raise self.fault(self.min_field, f"it should be at most {self.max_field}, which is {most}")
        if sum(map(len, self.stop or ())) > MAX_STOP_CHARS:
            raise self.fault("stop", f"at most {MAX_STOP_CHARS} characters in all")
        return self

    def fault(self, name: str, allowed: str) -> FieldError:
        """What is wrong with a field of these, for a validator to raise."""
        return FieldError.of(name, value=getattr(self, name), allowed=allowed)

    def draw_seed(self) -> int:
        """The seed of the first sequence: the client's, or a new one.

        A new one, and those that follow it, are below 2^53, so that they survive readers that hold doubles.
        """
        return secrets.randbelow(2**53 - MAX_BEST_OF) if self.seed is None else self.seed

    def params(self, *, end_ids: Sequence[int]) -> SamplingParams:
        """The fields as the model takes them, with a seed; what is not given has the default that switches it off."""
        names = {field.name for field in fields(SamplingParams)} & SamplingFields.model_fields.keys()
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(
            **given
            | {
                "temperature": 0.0 if self.is_greedy else given.get("temperature", 1.0),
                "top_k": max(given.get("top_k", 0), 0),
                "logit_bias": tuple((self.logit_bias or {}).items()),
                "end_ids": tuple(sorted(end_ids)),
                "min_new_tokens": getattr(self, self.min_field),
                "num_top": getattr(self, self.top_field) or 0,
                "seed": self.draw_seed(),
            }
        )


def plan_generations(
    asked: SamplingFields,
    *,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    timeout_s: float | None,
    prompt_extras: Extras | None,
) -> list[GenerationPlan]:
    """What is asked of each prompt.

    Raises:
        InvalidField: an id, or the number of top tokens, is more than the vocabulary has.
    """
    stop_token_ids = read_ids(asked.stop_token_ids or (), field=f"{asked.path}stop_token_ids", tokenizer=tokenizer)
    for token in asked.logit_bias or ():
        check_id(token, field=f"{asked.path}logit_bias.{token}", tokenizer=tokenizer)
    num_top = getattr(asked, asked.top_field) or 0
    if num_top > tokenizer.vocab_size:
        allowed = f"there are {tokenizer.vocab_size} tokens"
        raise InvalidField.of(f"{asked.path}{asked.top_field}", value=num_top, allowed=allowed)
    eos = () if asked.ignore_eos or tokenizer.eos_id is None else (tokenizer.eos_id,)
    named = frozenset(stop_token_ids.tolist()).difference(eos)
    stops = StopStrings(asked.stop or ())
    return [
        GenerationPlan(
            tokens=prompt.tokens,
            sampling=asked.params(end_ids=[*named, *eos]),
            max_new_tokens=getattr(asked, asked.max_field) or UNLIMITED,
            num_sequences=asked.num_generated,
            stops=stops,
            stop_token_ids=named,
            timeout_s=timeout_s,
            prompt_extras=prompt_extras,
        )
        for prompt in prompts
    ]

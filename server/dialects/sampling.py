"""The sampling parameters on the wire: the one definition, which every dialect that generates inherits.

`model.sampling.params` defines what the parameters do. The command line, the form of the page and the documentation are
derived from the fields here. Knows no model, so `plan_generations` checks token ids later.
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

MAX_STOP_CHARS = 65536  # of all stop strings together; their automaton takes about 1 us a character to build
MAX_IDS = 1024  # in stop_token_ids and in logit_bias
MAX_BIAS = 100
MAX_N = 8
MAX_BEST_OF = 16

_ID = re.compile(r"0|[1-9][0-9]{0,9}")  # a single spelling for each id, so that no two keys mean the same id


def _read_bias(value: Any) -> dict[int, float]:
    """Validate by hand: a thousand wrong entries give one error, with its key and the whole range."""
    if not isinstance(value, dict):
        raise FieldError.of("", value=value, allowed="it should be an object, by token id")
    if len(value) > MAX_IDS:
        raise FieldError("", f"{len(value)} entries are not allowed; at most {MAX_IDS}")
    for key, bias in value.items():
        name = shorten(str(key))
        if not _ID.fullmatch(str(key)):
            raise FieldError.of(name, value=key, allowed="it should be a token id, digits without leading zeros")
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:  # NaN is in no range
            raise FieldError.of(name, value=bias, allowed=f"it should be at least {-MAX_BIAS} and at most {MAX_BIAS}")
    return {int(key): float(bias) for key, bias in value.items()}


LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_read_bias, json_schema_input_type=dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]]),
]
Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True)]


class FilterFields(RequestBody):
    """The temperature and the filters. A request that sets any of them samples; null means "not set"."""

    temperature: float | None = Field(default=None, ge=0, le=2, description="0 = greedy; when sampling, 1 if not set")
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1, description="keep the k most probable tokens; 0 = off")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="keep the most probable tokens up to this total probability"
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="keep tokens with at least this share of the top token's probability"
    )
    typical_p: float | None = Field(
        default=None, gt=0, le=1, description="keep the tokens of most typical surprisal up to this total probability"
    )

    @property
    def given_filters(self) -> list[str]:
        """Names of the set fields, each of which makes the request sample."""
        return [name for name in FilterFields.model_fields if getattr(self, name) is not None]


class SamplingFields(FilterFields):
    """All fields that control how tokens are sampled and what ends the output, except the lengths."""

    path: ClassVar[str] = ""  # path of these fields in the body, with a dot at its end
    min_field: ClassVar[str]  # names of fields that differ between dialects
    max_field: ClassVar[str]
    top_field: ClassVar[str]

    repetition_penalty: float = Field(
        default=1,
        gt=0,
        description="divides positive, multiplies negative logits of tokens in prompt or output; 1 = off",
    )
    frequency_penalty: float = Field(
        default=0, ge=-2, le=2, description="subtracted from a token's logit for each time it is in the output"
    )
    presence_penalty: float = Field(
        default=0, ge=-2, le=2, description="subtracted once from the logit of each token in the output"
    )
    logit_bias: LogitBias | None = Field(
        default=None, description=f'numbers added to logits, by token id ("17"); at most {MAX_IDS} entries'
    )
    seed: int | None = Field(
        default=None, ge=0, le=2**64 - 1, description="random if not set; each further sequence has the next seed"
    )
    stop: Stop | None = Field(default=None, description="texts that end the output and are not part of it")
    stop_token_ids: list[TokenId] | None = Field(
        default=None,
        max_length=MAX_IDS,
        fail_fast=True,
        description="ids that end the output, without adding their text",
    )
    ignore_eos: bool = Field(default=False, description="continue after the end-of-text token")
    n: int = Field(default=1, ge=1, le=MAX_N, description="continuations of each input, in the order of the inputs")
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BEST_OF,
        description="sequences to generate, of which the n with the highest mean log-probability are returned, best "
        "first; n if not set; plain replies only",
    )

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the most probable token."""
        raise NotImplementedError

    @property
    def num_generated(self) -> int:
        """Number of sequences to generate for each input."""
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
        """Return the error of a field of this body, for a validator to raise. `allowed`: what the field may be."""
        return FieldError.of(name, value=getattr(self, name), allowed=allowed)

    def draw_seed(self) -> int:
        """Return the seed of the first sequence: the client's or a random seed.

        A random seed and the seeds after it are below 2^53, because some JSON readers store numbers as doubles.
        """
        return secrets.randbelow(2**53 - MAX_BEST_OF) if self.seed is None else self.seed

    def params(self, *, end_ids: Sequence[int]) -> SamplingParams:
        """Return the model's sampling parameters, with a seed. A field that is not set is disabled."""
        names = {field.name for field in fields(SamplingParams)} & SamplingFields.model_fields.keys()
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(
            **values
            | {
                "temperature": 0.0 if self.is_greedy else values.get("temperature", 1.0),
                "top_k": max(values.get("top_k", 0), 0),
                "logit_bias": tuple((self.logit_bias or {}).items()),
                "end_ids": tuple(sorted(end_ids)),
                "min_new_tokens": getattr(self, self.min_field),
                "num_top": getattr(self, self.top_field) or 0,
                "seed": self.draw_seed(),
            }
        )


def plan_generations(
    sampling: SamplingFields,
    *,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    timeout_s: float | None,
    prompt_extras: Extras | None,
) -> list[GenerationPlan]:
    """Return a plan for each prompt.

    Raises:
        InvalidField: a token id is not in the vocabulary, or more top tokens are requested than it has.
    """
    stop_token_ids = read_ids(
        sampling.stop_token_ids or (), field=f"{sampling.path}stop_token_ids", tokenizer=tokenizer
    )
    for token in sampling.logit_bias or ():
        check_id(token, field=f"{sampling.path}logit_bias.{token}", tokenizer=tokenizer)
    num_top = getattr(sampling, sampling.top_field) or 0
    if num_top > tokenizer.vocab_size:
        allowed = f"there are {tokenizer.vocab_size} tokens"
        raise InvalidField.of(f"{sampling.path}{sampling.top_field}", value=num_top, allowed=allowed)
    eos = () if sampling.ignore_eos or tokenizer.eos_id is None else (tokenizer.eos_id,)
    listed = frozenset(stop_token_ids.tolist()).difference(eos)
    stops = StopStrings(sampling.stop or ())
    return [
        GenerationPlan(
            tokens=prompt.tokens,
            sampling=sampling.params(end_ids=[*listed, *eos]),
            max_new_tokens=getattr(sampling, sampling.max_field) or UNLIMITED,
            num_sequences=sampling.num_generated,
            stops=stops,
            stop_token_ids=listed,
            timeout_s=timeout_s,
            prompt_extras=prompt_extras,
        )
        for prompt in prompts
    ]

"""From checked parameters to what the engine is told: every default applied, every id one of the tokenizer's.

Work in proportion to prompts and stop strings, so that a thread can do it beside the event loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.tokenizer import Tokenizer
from server.dialects.generate.schema import Parameters
from server.errors import InvalidField
from server.protocol.messages import Generate, Sampling
from server.requests.output_text import StopStrings
from server.requests.prompts import Prompt, check_id, read_ids

UNLIMITED = 2**62  # tokens; no sequence lives that long


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """What is asked of one input, validated and defaulted: one or several sequences that share the prompt."""

    tokens: NDArray[np.int32]  # the prompt, at least one
    echo: str = ""  # what generated_text begins with
    sampling: Sampling  # of the first sequence
    max_new_tokens: int
    num_sequences: int = 1
    stops: StopStrings
    stop_token_ids: frozenset[int] = frozenset()  # those of sampling.end_ids that the client named
    timeout_s: float | None = None
    prompt_scores: bool = False
    logprobs: bool = True

    def seed(self, place: int) -> int:
        """That of the sequence at a place among those of this input."""
        return (self.sampling.seed + place) % 2**64

    def message(self, new_id: Callable[[], str]) -> Generate:
        """What the engine is told."""
        return Generate(
            id=new_id(),
            tokens=self.tokens.astype("<i4", copy=False).tobytes(),
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens,
            timeout_s=self.timeout_s,
            prompt_scores=self.prompt_scores,
            forks=tuple((new_id(), self.seed(place)) for place in range(1, self.num_sequences)),
        )


def make_plans(
    asked: Parameters, *, prompts: Sequence[Prompt], tokenizer: Tokenizer, timeout_s: float | None
) -> list[GenerationPlan]:
    """What is asked of each prompt.

    Raises:
        InvalidField: an id, or the number of top tokens, is more than the vocabulary has.
    """
    stop_token_ids = read_ids(asked.stop_token_ids or (), field="parameters.stop_token_ids", tokenizer=tokenizer)
    for token in asked.logit_bias or ():
        check_id(token, field=f"parameters.logit_bias.{token}", tokenizer=tokenizer)
    if asked.top_n_tokens > tokenizer.vocab_size:
        allowed = f"there are {tokenizer.vocab_size} tokens"
        raise InvalidField.of("parameters.top_n_tokens", value=asked.top_n_tokens, allowed=allowed)
    stops = StopStrings(asked.stop or ())
    eos = () if asked.ignore_eos or tokenizer.eos_id is None else (tokenizer.eos_id,)
    named = frozenset(stop_token_ids.tolist()).difference(eos)
    return [
        GenerationPlan(
            tokens=prompt.tokens[-(asked.truncate or 0) :],
            echo=_echo(prompt, tokenizer=tokenizer) if asked.return_full_text else "",
            sampling=_sampling(asked, end_ids=named.union(eos)),
            max_new_tokens=asked.max_new_tokens or UNLIMITED,
            num_sequences=asked.num_sequences,
            stops=stops,
            stop_token_ids=named,
            timeout_s=timeout_s,
            prompt_scores=asked.decoder_input_details,
            logprobs=asked.logprobs,
        )
        for prompt in prompts
    ]


def _echo(prompt: Prompt, *, tokenizer: Tokenizer) -> str:
    """The prompt as text, whole even where it was truncated for the model."""
    return tokenizer.decode(prompt.tokens.tolist()) if prompt.text is None else prompt.text


def _sampling(asked: Parameters, *, end_ids: frozenset[int]) -> Sampling:
    temperature = 1.0 if asked.temperature is None else asked.temperature
    return Sampling(
        temperature=0.0 if asked.is_greedy else temperature,
        top_k=asked.top_k or 0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        min_p=asked.min_p or 0.0,
        typical_p=1.0 if asked.typical_p is None else asked.typical_p,
        repetition_penalty=asked.repetition_penalty,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        logit_bias=tuple((asked.logit_bias or {}).items()),
        end_ids=tuple(sorted(end_ids)),
        min_new_tokens=asked.min_new_tokens,
        num_top=asked.top_n_tokens,
        seed=asked.draw_seed(),
    )

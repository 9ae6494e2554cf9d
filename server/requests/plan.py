"""The plan of the sequences that continue one input: the engine's message, and the conditions that end the output."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.sampling.params import SamplingParams
from server.protocol.messages import Extras, Generate
from server.requests.output_text import StopStrings

UNLIMITED = 2**62  # tokens; no sequence lives that long


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """A validated request to continue one prompt, by one or several sequences."""

    tokens: NDArray[np.int32]  # the prompt, at least one token
    sampling: SamplingParams  # of the first sequence
    max_new_tokens: int
    num_sequences: int = 1
    stops: StopStrings
    stop_token_ids: frozenset[int] = frozenset()  # the ids in sampling.end_ids that the client listed
    timeout_s: float | None = None
    prompt_extras: Extras | None = None  # if set: report the scores of the prompt too

    def seed(self, index: int) -> int:
        """Return the seed of a sequence. `index`: its number among the sequences of this input, from 0."""
        return (self.sampling.seed + index) % 2**64

    def message(self, new_id: Callable[[], str]) -> Generate:
        """Return the message for the engine."""
        return Generate(
            id=new_id(),
            tokens=self.tokens.astype("<i4", copy=False).tobytes(),
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens,
            timeout_s=self.timeout_s,
            prompt_extras=self.prompt_extras,
            forks=tuple((new_id(), self.seed(index)) for index in range(1, self.num_sequences)),
        )

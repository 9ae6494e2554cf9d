"""What is asked of one input, validated and defaulted: what the engine is told, and when the output ends."""

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
    """One or several sequences that continue the same prompt."""

    tokens: NDArray[np.int32]  # the prompt, at least one
    sampling: SamplingParams  # of the first sequence
    max_new_tokens: int
    num_sequences: int = 1
    stops: StopStrings
    stop_token_ids: frozenset[int] = frozenset()  # those of sampling.end_ids that the client named
    timeout_s: float | None = None
    prompt_extras: Extras | None = None  # if set: report the scores of the prompt too

    def seed(self, place: int) -> int:
        """The seed of the sequence at a place among those of this input."""
        return (self.sampling.seed + place) % 2**64

    def message(self, new_id: Callable[[], str]) -> Generate:
        """What the engine is told."""
        return Generate(
            id=new_id(),
            tokens=self.tokens.astype("<i4", copy=False).tobytes(),
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens,
            timeout_s=self.timeout_s,
            prompt_extras=self.prompt_extras,
            forks=tuple((new_id(), self.seed(place)) for place in range(1, self.num_sequences)),
        )

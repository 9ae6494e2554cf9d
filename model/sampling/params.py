"""The sampling parameters of one sequence: their only definition. Knows no torch and no HTTP.

A parameter that restricts the tokens has its filter in `model.sampling.filters`; `model.sampling.penalties` applies the
parameters that change logits. `server.dialects.sampling` declares the field that a client sends.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SamplingParams:
    """The sampling parameters of one sequence. The default of each field switches the field off."""

    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # on tokens that occurred in the prompt or the output
    frequency_penalty: float = 0.0  # subtracted for each occurrence of the token in the output
    presence_penalty: float = 0.0  # subtracted once if the token occurred in the output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, number added to its logit)
    end_ids: tuple[int, ...] = ()  # tokens that end the sequence; not drawn before `min_new_tokens` tokens
    min_new_tokens: int = 0
    num_top: int = 0  # how many of the most probable tokens to return with each drawn token
    seed: int = 0  # u64; seed and position alone decide the noise of a draw

    @property
    def is_plain(self) -> bool:
        """Whether temperature, seed and position alone decide the token: nothing filters or changes the logits."""
        return replace(self, temperature=0.0, seed=0, end_ids=()) == SamplingParams()

    @property
    def is_penalised(self) -> bool:
        """Whether a draw depends on which tokens occurred before."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

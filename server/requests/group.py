"""The generated sequences of a request: started all or none, chosen from at the end, told of in the log."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from server.dialects.generate.replies import GenerateReply
from server.requests.generation import Generation
from server.requests.plan import GenerationPlan
from server.requests.prompt_scores import PromptScores
from server.requests.service import LiveSequence, Service


@dataclass(frozen=True)
class GenerationGroup:
    """Live sequences, those of the first input first."""

    plans: list[GenerationPlan]  # one an input
    generations: list[Generation]
    num_returned: int  # of the sequences of each input

    @classmethod
    def start(
        cls, plans: list[GenerationPlan], *, service: Service, request_id: str, num_returned: int, numbered: bool
    ) -> "GenerationGroup":
        """Admit all sequences or none; `numbered` tells their events apart.

        Raises:
            Starting, Draining, EngineDown, QueueFull: none was admitted.
        """
        live = service.submit([plan.message(service.new_id) for plan in plans], request_id=request_id)
        return cls.of(plans, live=live, service=service, num_returned=num_returned, numbered=numbered)

    @classmethod
    def of(
        cls,
        plans: list[GenerationPlan],
        *,
        live: Sequence[LiveSequence],
        service: Service,
        num_returned: int,
        numbered: bool,
    ) -> "GenerationGroup":
        """The same of sequences that were admitted together with others. `live`: in the order of the plans."""
        prompts = [(plan, PromptScores(plan.tokens, tokenizer=service.tokenizer)) for plan in plans]
        places = [(plan, prompt, place) for plan, prompt in prompts for place in range(plan.num_sequences)]
        generations = [
            Generation(plan, place=place, prompt=prompt, live=one, service=service, sequence=i if numbered else UNSET)
            for i, (one, (plan, prompt, place)) in enumerate(zip(live, places, strict=True))
        ]
        return cls(plans, generations, num_returned)

    def close(self) -> None:
        """Let go of all sequences, also of those that nobody came to wait for."""
        for one in self.generations:
            one.close()

    def returned(self, replies: Sequence[GenerateReply]) -> list[tuple[Generation, GenerateReply]]:
        """What was asked for of all replies, which come in order: all, or those of the best sequences of each input."""
        chosen: list[tuple[Generation, GenerateReply]] = []
        pairs = list(zip(self.generations, replies, strict=True))
        start = 0
        for plan in self.plans:
            pairs_of_input = pairs[start : start + plan.num_sequences]
            start += plan.num_sequences
            if len(pairs_of_input) > self.num_returned:
                pairs_of_input.sort(key=lambda pair: pair[0].mean_logprob, reverse=True)
            chosen += pairs_of_input[: self.num_returned]
        return chosen

    def summary(self) -> dict[str, Any]:
        """For the log: counts and times, no text."""
        details = [one.details for one in self.generations]
        timings = [one.timings for one in details if one is not None]
        return {
            "sequences": len(details),
            "prompt_tokens": sum(len(plan.tokens) for plan in self.plans),
            "generated_tokens": sum(one.num_tokens for one in self.generations),
            "finish_reasons": ["unfinished" if one is None else one.finish_reason for one in details],
            "queue_ms": max((one.queue_ms for one in timings), default=None),
            "prefill_ms": max((one.prefill_ms for one in timings), default=None),
            "decode_ms": max((one.decode_ms for one in timings), default=None),
        }

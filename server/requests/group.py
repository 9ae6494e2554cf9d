"""The generated sequences of a request: made together, chosen from at the end, told of in the log."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.requests.generation import Generation
from server.requests.plan import GenerationPlan
from server.requests.prompt_scores import PromptScores
from server.requests.results import Generated, WorkSummary
from server.requests.service import LiveSequence, Service


@dataclass(frozen=True)
class GenerationGroup:
    """Live sequences, those of the first input first."""

    plans: list[GenerationPlan]  # one an input
    generations: list[Generation]
    num_returned: int  # of the sequences of each input

    @classmethod
    def of(
        cls,
        plans: list[GenerationPlan],
        *,
        live: Sequence[LiveSequence],
        service: Service,
        num_returned: int,
        is_alone: bool,
    ) -> "GenerationGroup":
        """The group of admitted sequences. `live`: in the order of the plans; `is_alone`: see `Generation`."""
        prompts = [
            None
            if plan.prompt_extras is None
            else PromptScores(plan.tokens, tokenizer=service.tokenizer, extras=plan.prompt_extras)
            for plan in plans
        ]
        places = [
            (plan, prompt, place)
            for plan, prompt in zip(plans, prompts, strict=True)
            for place in range(plan.num_sequences)
        ]
        generations = [
            Generation(plan, place=place, prompt=prompt, live=one, service=service, is_alone=is_alone)
            for one, (plan, prompt, place) in zip(live, places, strict=True)
        ]
        return cls(plans, generations, num_returned)

    def close(self) -> None:
        """Let go of all sequences, also of those that nobody came to wait for."""
        for one in self.generations:
            one.close()

    def returned(self, results: Sequence[Generated]) -> list[Generated]:
        """The results that were asked for: all, or those of the best sequences of each input. They come in order."""
        chosen: list[Generated] = []
        pairs = list(zip(self.generations, results, strict=True))
        start = 0
        for plan in self.plans:
            pairs_of_input = pairs[start : start + plan.num_sequences]
            start += plan.num_sequences
            if len(pairs_of_input) > self.num_returned:
                pairs_of_input.sort(key=lambda pair: pair[0].mean_logprob, reverse=True)
            chosen += [result for _, result in pairs_of_input[: self.num_returned]]
        return chosen

    def summary(self, *, user: str | None = None) -> WorkSummary:
        """For the log: counts and times, no text."""
        endings = [one.ending for one in self.generations]
        return WorkSummary(
            sequences=len(endings),
            prompt_tokens=sum(len(plan.tokens) for plan in self.plans),
            generated_tokens=sum(one.num_tokens for one in self.generations),
            finish_reasons=["unfinished" if one is None else one.finish_reason for one in endings],
            timings=[one.timings for one in endings if one is not None],
            user=user,
        )

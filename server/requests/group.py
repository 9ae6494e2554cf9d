"""The group of all generated sequences of a request: makes them, selects the best and summarises them for the log."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.requests.generation import Generation
from server.requests.plan import GenerationPlan
from server.requests.prompt_scores import PromptScores
from server.requests.results import Generated, WorkSummary
from server.requests.service import LiveSequence, Service


@dataclass(frozen=True)
class GenerationGroup:
    """All generated sequences of a request, in the order of its inputs."""

    plans: list[GenerationPlan]  # one for each input
    generations: list[Generation]
    num_returned: int  # sequences of each input that the reply has

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
        """Make the group of admitted sequences. `live`: in the order of the plans; `is_alone`: see `Generation`."""
        prompts = [
            None
            if plan.prompt_extras is None
            else PromptScores(plan.tokens, tokenizer=service.tokenizer, extras=plan.prompt_extras)
            for plan in plans
        ]
        members = [
            (plan, prompt, index)
            for plan, prompt in zip(plans, prompts, strict=True)
            for index in range(plan.num_sequences)
        ]
        generations = [
            Generation(plan, index=index, prompt=prompt, live=sequence, service=service, is_alone=is_alone)
            for sequence, (plan, prompt, index) in zip(live, members, strict=True)
        ]
        return cls(plans, generations, num_returned)

    def close(self) -> None:
        """Free the rows of all sequences, also of sequences that nobody awaited."""
        for generation in self.generations:
            generation.close()

    def returned(self, results: Sequence[Generated]) -> list[Generated]:
        """Return the results for the reply: of each input the sequences with the highest mean log-probability.

        The inputs keep their order. Without best_of, all results are returned in their order.
        """
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
        """Return counts and times for the log, and no text."""
        endings = [generation.ending for generation in self.generations]
        return WorkSummary(
            sequences=len(endings),
            prompt_tokens=sum(len(plan.tokens) for plan in self.plans),
            generated_tokens=sum(generation.num_tokens for generation in self.generations),
            finish_reasons=["unfinished" if ending is None else ending.finish_reason for ending in endings],
            timings=[ending.timings for ending in endings if ending is not None],
            user=user,
        )

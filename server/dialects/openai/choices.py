"""A request of POST /v1/completions under way: what lives of it, and its parts in OpenAI's shapes. Knows no HTTP."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET, UnsetType

from server.dialects.generate.replies import FinishReason
from server.dialects.openai.logprobs import LogprobLister
from server.dialects.openai.replies import Choice, Completion, CompletionFinish, Logprobs, Usage
from server.dialects.openai.schema import CompletionRequest
from server.dialects.score.replies import ScoredToken
from server.protocol.messages import Generate, Score
from server.requests.group import GenerationGroup
from server.requests.plan import GenerationPlan
from server.requests.scoring import Document, Scoring, ScoringPlan
from server.requests.service import LiveSequence, Service

FINISH: dict[FinishReason, CompletionFinish] = {"eos_token": "stop", "stop_sequence": "stop"}  # all else cut it off


@dataclass(frozen=True)
class PromptPart:
    """What a choice says of its prompt."""

    text: str = ""
    logprobs: Logprobs | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is left of the body once its prompts were read; they may be large."""

    n: int
    generates: bool  # any token
    echo: bool
    logprobs: bool
    user: str | None

    @classmethod
    def of(cls, body: CompletionRequest) -> "Asked":
        """The flags of a body."""
        return cls(
            n=body.n, generates=body.max_tokens > 0, echo=body.echo, logprobs=body.logprobs is not None, user=body.user
        )


@dataclass(frozen=True, kw_only=True)
class CompletionRun:
    """Live sequences: a scoring of each prompt, if asked for, and the generations."""

    asked: Asked
    scorings: list[Scoring]  # one a prompt, or none at all
    group: GenerationGroup
    service: Service
    request_id: str
    created: int  # Unix time, seconds
    fingerprint: str

    @classmethod
    def start(
        cls, body: CompletionRequest, *, plans: list[GenerationPlan], service: Service, request_id: str
    ) -> "CompletionRun":
        """Admit all sequences or none.

        Raises:
            Starting, Draining, EngineDown, QueueFull: none was admitted.
        """
        asked = Asked.of(body)
        scored = [_scoring_plan(plan, body=body) for plan in plans] if body.scores_prompt else []
        messages: list[Generate | Score] = [
            Document(plan.tokens[:0], (plan.tokens,)).message(
                service.new_id, extras=plan.extras, timeout_s=service.deadline(body.timeout_s)
            )
            for plan in scored
        ]
        if asked.generates:
            messages += [plan.message(service.new_id) for plan in plans]
        live = service.submit(messages, request_id=request_id)
        return cls(
            asked=asked,
            scorings=[Scoring(plan, live=one, service=service) for plan, one in zip(scored, live, strict=False)],
            group=_group(plans, live=live[len(scored) :], asked=asked, service=service),
            service=service,
            request_id=request_id,
            created=int(time.time()),
            fingerprint=service.fingerprint,
        )

    @property
    def num_choices(self) -> int:
        """How many the answer has."""
        return len(self.group.plans) * self.asked.n

    def close(self) -> None:
        """Let go of all sequences, also of those that nobody came to wait for."""
        for one in self.scorings:
            one.close()
        self.group.close()

    def prompt_part(self, number: int, *, scored: Sequence[ScoredToken]) -> PromptPart:
        """What the choices of a prompt begin with. `scored`: its tokens, where the prompts are scored."""
        if not self.asked.echo:
            return PromptPart()
        tokenizer = self.service.tokenizer
        text = tokenizer.decode(self.group.plans[number].tokens.tolist())
        if not self.scorings:
            return PromptPart(text)
        lister = LogprobLister(tokenizer)
        for token in scored:
            lister.add(token, top=token.top or ())
        return PromptPart(text, lister.take())

    def lister(self, prompt: PromptPart) -> LogprobLister | None:
        """What lists the tokens that follow a prompt, if that is asked for."""
        return LogprobLister(self.service.tokenizer, offset=len(prompt.text)) if self.asked.logprobs else None

    def completion(self, choices: list[Choice], *, usage: Usage | UnsetType | None = UNSET) -> Completion:
        """A reply, or an event of a stream."""
        return Completion(
            f"cmpl-{self.request_id}",
            "text_completion",
            self.created,
            self.service.model_name,
            self.fingerprint,
            choices,
            usage,
        )

    def usage(self) -> Usage:
        """Tokens read and generated, once all has ended."""
        read = sum(len(plan.tokens) for plan in self.group.plans)
        generated = sum(one.num_tokens for one in self.group.generations)
        return Usage(read, generated, read + generated)

    def summary(self) -> dict[str, Any]:
        """For the log: counts and times, no text."""
        return {
            **self.group.summary(),
            **({"scored_tokens": sum(one.num_done for one in self.scorings)} if self.scorings else {}),
            **({} if self.asked.user is None else {"user": self.asked.user}),
        }


def finish_of(reason: FinishReason) -> CompletionFinish:
    """OpenAI's word."""
    return FINISH.get(reason, "length")


def _scoring_plan(plan: GenerationPlan, *, body: CompletionRequest) -> ScoringPlan:
    return ScoringPlan(
        tokens=plan.tokens, num_scored=len(plan.tokens) - 1, unit="token", lists_tokens=True, extras=body.extras
    )


def _group(plans: list[GenerationPlan], *, live: list[LiveSequence], asked: Asked, service: Service) -> GenerationGroup:
    if not asked.generates:
        return GenerationGroup(plans, [], asked.n)
    numbered = len(plans) * asked.n > 1
    return GenerationGroup.of(plans, live=live, service=service, num_returned=asked.n, numbered=numbered)

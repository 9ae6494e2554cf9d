"""The events of a streamed completion: prompts that are echoed, tokens as they come, the usage and [DONE]."""

import asyncio
from functools import partial

from msgspec import UNSET, UnsetType

from server.dialects.generate.replies import GenerateEvent
from server.dialects.openai.choices import CompletionRun, PromptPart, finish_of
from server.dialects.openai.replies import Choice, Usage
from server.protocol.json import encode_event
from server.requests.offload import beside_the_loop
from server.web.event_stream import Job, SendEvents

DONE = b"data: [DONE]\n\n"


class CompletionStream:
    """What sends the events of a run. The choices come as they are ready, each in its own order."""

    def __init__(self, run: CompletionRun, *, include_usage: bool) -> None:
        self._run = run
        self._include_usage = include_usage
        self._num_left = run.num_choices
        loop = asyncio.get_running_loop()
        self._prompts: list[asyncio.Future[PromptPart]] = [loop.create_future() for _ in run.group.plans]

    def jobs(self) -> list[Job]:
        """One for each prompt and each choice; the one that ends last sends the end."""
        prompts = [partial(self._read_prompt, number) for number in range(len(self._prompts))]
        return [*prompts, *(partial(self._send_choice, index) for index in range(self._run.num_choices))]

    async def _read_prompt(self, number: int, _send: SendEvents) -> None:
        run = self._run
        scored = await run.scorings[number].tokens() if run.scorings else []
        size = run.group.plans[number].tokens.nbytes if run.asked.echo else 0
        part = await beside_the_loop(lambda: run.prompt_part(number, scored=scored), size=size)
        self._prompts[number].set_result(part)

    async def _send_choice(self, index: int, send: SendEvents) -> None:
        run = self._run
        prompt = await asyncio.shield(self._prompts[index // run.asked.n])
        choice = _ChoiceEvents(run, index=index, prompt=prompt, usage=None if self._include_usage else UNSET)
        if run.asked.echo:
            await send(choice.of_prompt())
        if run.asked.generates:
            await run.group.generations[index].run(send, encode=choice.of_token)
        self._num_left -= 1
        if not self._num_left:
            usage = encode_event(run.completion([], usage=run.usage())) if self._include_usage else b""
            await send(usage + DONE)


class _ChoiceEvents:
    """Framed events of one choice."""

    def __init__(self, run: CompletionRun, *, index: int, prompt: PromptPart, usage: Usage | UnsetType | None) -> None:
        self._run = run
        self._index = index
        self._prompt = prompt
        self._usage = usage
        self._lister = run.lister(prompt)
        self._num_sent = 0  # characters of the output

    def of_prompt(self) -> bytes:
        """The prompt, which is all where nothing is generated."""
        ends = None if self._run.asked.generates else finish_of("length")
        return self._framed(Choice(self._index, self._prompt.text, self._prompt.logprobs, ends))

    def of_token(self, event: GenerateEvent) -> bytes:
        """What an event of the generation adds. Its last one may have text that is in no token."""
        text = "" if event.token is None else event.token.text
        if event.details is not None:
            assert event.generated_text is not None
            text = event.generated_text[self._num_sent :]
        self._num_sent += len(text)
        logprobs = None
        if self._lister is not None and event.token is not None:
            self._lister.add(event.token, top=event.top_tokens or ())
            logprobs = self._lister.take()
        finish = None if event.details is None else finish_of(event.details.finish_reason)
        return self._framed(Choice(self._index, text, logprobs, finish))

    def _framed(self, choice: Choice) -> bytes:
        return encode_event(self._run.completion([choice], usage=self._usage))

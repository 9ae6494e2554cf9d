"""Tests of huggingface_hub's clients against a whole server: plain, with details, streamed, and with errors."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import OverloadedError, ValidationError

from tests.support.agreement_bundle import TEXT, write_bundle
from tests.support.live_server import live_server

pytestmark = [pytest.mark.slow, pytest.mark.anyio]
PROMPT = TEXT[:60]
ASKED: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.9, "top_k": 50, "seed": 11, "stop": ["qq"]}


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    bundle = write_bundle(tmp_path_factory.mktemp("bundles") / "masked")
    with live_server(bundle, "--num-rows", "2", "--max-waiting", "0") as url:
        yield url


@pytest.fixture(scope="module")
def wanted(url) -> dict[str, Any]:
    """Return the server's answer without the client between."""
    parameters = {**ASKED, "details": True, "decoder_input_details": True, "top_n_tokens": 2}
    reply = httpx.post(f"{url}/generate", json={"inputs": PROMPT, "parameters": parameters}, timeout=60)
    return reply.json()


def check_details(output: Any, wanted: dict[str, Any]) -> None:
    assert output.generated_text == wanted["generated_text"]
    details, own = output.details, wanted["details"]
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 20, 11)
    assert [token.id for token in details.tokens] == [token["id"] for token in own["tokens"]]
    assert [token.logprob for token in details.tokens] == [token["logprob"] for token in own["tokens"]]
    assert [token.logprob for token in details.prefill] == [token["logprob"] for token in own["prefill"]]
    assert details.prefill[0].logprob is None
    assert details.top_tokens == own["top_tokens"]  # lists of lists stay as the server sent them


def check_events(events: list[Any], wanted: dict[str, Any]) -> None:
    assert [event.index for event in events] == list(range(1, 21))
    assert "".join(event.token.text for event in events) == wanted["generated_text"]
    assert [event.token.logprob for event in events] == [token["logprob"] for token in wanted["details"]["tokens"]]
    assert [event.generated_text for event in events] == [None] * 19 + [wanted["generated_text"]]
    assert (events[-1].details.finish_reason, events[-1].details.generated_tokens) == ("length", 20)


def test_plainly(url, wanted):
    with InferenceClient(url) as client:
        assert client.text_generation(PROMPT, **ASKED) == wanted["generated_text"]
        full = client.text_generation(PROMPT, **ASKED, return_full_text=True)
        check_details(
            client.text_generation(PROMPT, **ASKED, details=True, decoder_input_details=True, top_n_tokens=2), wanted
        )
    assert full == PROMPT + wanted["generated_text"]


def test_streamed(url, wanted):
    with InferenceClient(url) as client:
        assert "".join(client.text_generation(PROMPT, **ASKED, stream=True)) == wanted["generated_text"]
        check_events(list(client.text_generation(PROMPT, **ASKED, stream=True, details=True)), wanted)


async def test_asynchronously(url, wanted):
    async with AsyncInferenceClient(url) as client:
        assert await client.text_generation(PROMPT, **ASKED) == wanted["generated_text"]
        check_details(
            await client.text_generation(PROMPT, **ASKED, details=True, decoder_input_details=True, top_n_tokens=2),
            wanted,
        )
        texts = [text async for text in await client.text_generation(PROMPT, **ASKED, stream=True)]
        assert "".join(texts) == wanted["generated_text"]
        streamed = await client.text_generation(PROMPT, **ASKED, stream=True, details=True)
        check_events([event async for event in streamed], wanted)


def test_without_any_parameter(url):
    with InferenceClient(url) as client:
        greedy = client.text_generation(PROMPT)
    reply = httpx.post(f"{url}/generate", json={"inputs": PROMPT}, timeout=60)
    assert greedy == reply.json()["generated_text"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_invalid_is_an_error_that_names_the_field(url, stream):
    with InferenceClient(url) as client:
        with pytest.raises(ValidationError, match="temperature: 3"):
            client.text_generation(PROMPT, temperature=3, stream=stream)
        with pytest.raises(ValidationError, match="watermark: unknown field"):
            client.text_generation(PROMPT, watermark=True, stream=stream)


def test_a_full_server_is_an_error_that_it_knows(url):
    busy = {"inputs": ["a", "b"], "parameters": {"max_new_tokens": None}, "stream": True}
    with InferenceClient(url) as client, httpx.stream("POST", f"{url}/generate", json=busy, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        with pytest.raises(OverloadedError, match="queue_full"):
            client.text_generation(PROMPT)
        with pytest.raises(OverloadedError, match="queue_full"):
            client.text_generation(PROMPT, stream=True)

"""Tests of the `openai` package against a whole server: it parses every answer and error, and the figures are exact."""

import math
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai.types import Completion

from tests.support.agreement_bundle import TEXT, write_bundle
from tests.support.http_harness import eventually, make_link, serving
from tests.support.live_server import live_server

pytestmark = [pytest.mark.slow, pytest.mark.anyio]
KEY = "key-for-the-openai-client"
MODEL = "masked"


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    bundle = write_bundle(tmp_path_factory.mktemp("bundles") / MODEL)
    with live_server(bundle, "--num-rows", "4", "--max-waiting", "4", keys=KEY) as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def post(url: str, path: str, body: dict) -> dict:
    reply = httpx.post(url + path, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_what_generate_says(client, url):
    completion = client.completions.create(model=MODEL, prompt=TEXT[:40], max_tokens=24, temperature=0)
    parameters = {"max_new_tokens": 24, "details": True}
    generated = post(url, "/generate", {"inputs": TEXT[:40], "parameters": parameters})
    (choice,) = completion.choices
    assert (choice.text, choice.finish_reason) == (generated["generated_text"], "length")
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (40, 24)
    assert completion.system_fingerprint == generated["details"]["fingerprint"]
    assert completion.object == "text_completion"


def test_what_is_drawn_is_what_generate_draws_from_the_seed(client, url):
    completion = client.completions.create(
        model=MODEL, prompt=["It was", "Rain"], n=2, max_tokens=16, seed=7, top_p=0.9, extra_body={"top_k": 40}
    )
    parameters = {"max_new_tokens": 16, "seed": 7, "top_p": 0.9, "top_k": 40, "n": 2}
    replies = post(url, "/generate", {"inputs": ["It was", "Rain"], "parameters": parameters})
    assert [choice.text for choice in completion.choices] == [reply["generated_text"] for reply in replies]
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_the_prompt_is_scored_as_score_does(client, url, max_tokens):
    text = TEXT[:230]  # longer than the longest ring, and with a character of two tokens
    completion = client.completions.create(
        model=MODEL, prompt=text, max_tokens=max_tokens, echo=True, logprobs=3, temperature=0
    )
    scored = post(url, "/score", {"inputs": text, "return": ["tokens", "top"], "top": 3})["tokens"]
    (choice,) = completion.choices
    lists, num_prompt = choice.logprobs, len(scored)
    assert lists is not None
    assert lists.tokens is not None
    assert lists.token_logprobs is not None
    assert lists.top_logprobs is not None
    assert lists.text_offset is not None
    assert [len(one) for one in (lists.tokens, lists.top_logprobs, lists.text_offset)] == [num_prompt + max_tokens] * 3
    assert lists.token_logprobs[:num_prompt] == [token["logprob"] for token in scored]
    assert lists.token_logprobs[0] is None
    assert lists.top_logprobs[0] is None
    for top, token, logprob in zip(lists.top_logprobs[1:], scored[1:], lists.token_logprobs[1:], strict=False):
        assert list(top.values())[:3] == [one["logprob"] for one in token["top"]]
        assert (logprob == max(top.values())) == (token["rank"] == 0)
        assert len(top) == (3 if token["rank"] < 3 else 4)
    assert choice.text.startswith(text)
    for name, offset in zip(lists.tokens, lists.text_offset, strict=True):
        assert name.startswith("bytes:") or choice.text[offset:].startswith(name)


def test_a_stream_adds_up_to_the_plain_reply(client):
    asked = {"model": MODEL, "prompt": "It was", "max_tokens": 32, "seed": 3, "stop": ["q", "zz"]}
    plain = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == plain.choices[0].text
    assert chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage


async def test_the_async_client_reads_both(async_client):
    asked = {"model": MODEL, "prompt": [73, 116], "max_tokens": 20, "temperature": 0, "logprobs": 1}
    plain = await async_client.completions.create(**asked)
    chunks = [chunk async for chunk in await async_client.completions.create(**asked, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text
    logprobs = [value for chunk in chunks for value in chunk.choices[0].logprobs.token_logprobs]
    assert logprobs == plain.choices[0].logprobs.token_logprobs
    assert all(math.isfinite(value) for value in logprobs)


def test_every_error_has_its_class_and_names_the_field(client, url):
    create = client.completions.create
    with pytest.raises(openai.UnprocessableEntityError) as invalid:
        create(model=MODEL, prompt="a", temperature=3)
    assert (invalid.value.param, invalid.value.code, invalid.value.type) == (
        *("temperature", "invalid_field", "validation"),
    )
    assert "temperature: 3" in str(invalid.value)
    with pytest.raises(openai.UnprocessableEntityError) as suffixed:
        create(model=MODEL, prompt="a", suffix="z")
    assert suffixed.value.param == "suffix"
    with pytest.raises(openai.UnprocessableEntityError) as unknown:
        create(model=MODEL, prompt="a", extra_body={"guided_regex": "a*"})
    assert unknown.value.param == "guided_regex"
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-3.5-turbo-instruct", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.post("/completions", content=b"{", cast_to=object)
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        stranger.models.list()
    assert refused.value.code == "unauthorized"


def test_a_full_server_is_a_rate_limit_that_ends_when_the_streams_do(client):
    asked = {"model": MODEL, "prompt": "a", "max_tokens": 10**9}
    with client.completions.create(**asked, n=8, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model=MODEL, prompt="a", stream=True)
        assert full.value.code == "queue_full"
        assert int(full.value.response.headers["retry-after"]) >= 1
    patient = client.with_options(max_retries=10)
    assert patient.completions.create(model=MODEL, prompt="a", max_tokens=1).usage.completion_tokens == 1


async def test_a_failure_in_a_stream_is_raised_with_its_message():
    link, texts = make_link(hang_after=2), []

    async def read(stream: openai.AsyncStream[Completion]) -> None:
        async for chunk in stream:
            texts.append(chunk.choices[0].text)

    async with (
        serving(link) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any") as client,
    ):
        stream = await client.completions.create(model="tiny", prompt="a", temperature=0, stream=True)
        await eventually(lambda: link.num_hanging)
        link.end_all("error", error="not finite")
        with pytest.raises(openai.APIError, match="the engine gave up: not finite"):
            await read(stream)
    assert texts == ["T", "h"]


async def test_a_request_is_cancelled_by_its_id(async_client, url):
    stream = await async_client.completions.create(
        model=MODEL, prompt="a", max_tokens=10**9, stream=True, extra_headers={"X-Request-Id": "mine"}
    )
    reasons = []
    async for chunk in stream:
        if not reasons:
            assert chunk.id == "cmpl-mine"
            reply = httpx.delete(f"{url}/requests/mine", headers={"Authorization": f"Bearer {KEY}"})
            assert reply.json()["cancelled"] == 1
        reasons.append(chunk.choices[0].finish_reason)
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}

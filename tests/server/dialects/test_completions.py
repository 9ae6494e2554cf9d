"""Tests of POST /v1/completions over a fake engine: the messages to the engine, and the answers in OpenAI's format."""

import asyncio
import logging
from dataclasses import asdict, replace
from typing import Any

import httpx
import pytest

from server.protocol.messages import Extras, Generate
from tests.support.completion_harness import PATH, choices_of, complete, refusal, stream
from tests.support.fake_link import FakeLink
from tests.support.http_harness import SCRIPT, eventually, make_client, make_link, post

pytestmark = pytest.mark.anyio


async def test_a_completion_has_the_shape_of_openai():
    reply = await complete(prompt="abc", max_tokens=9)
    assert reply == {
        "id": reply["id"],
        "object": "text_completion",
        "created": reply["created"],
        "model": "tiny",
        "system_fingerprint": reply["system_fingerprint"],
        "choices": [{"index": 0, "text": "The café", "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12},
    }
    assert reply["id"].startswith("cmpl-")
    assert reply["system_fingerprint"].startswith("abababababab-")
    assert reply["created"] > 1_700_000_000


async def test_it_samples_at_temperature_1_and_stops_after_16_tokens_unless_told_otherwise():
    link = make_link()
    reply = (await post(PATH, {"prompt": "a"}, link=link)).json()
    (message,) = link.submitted
    assert isinstance(message, Generate)
    assert (message.sampling.temperature, message.sampling.top_p, message.max_new_tokens) == (1, 1, 16)
    assert reply["usage"]["completion_tokens"] == 16


async def test_null_is_the_default_of_every_field_but_the_prompt():
    link = make_link()
    document = await _document(link)
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert len(fields) > 20
    reply = await post(PATH, dict.fromkeys(fields) | {"prompt": "a"}, link=link)
    assert reply.status_code == 200
    await post(PATH, {"prompt": "a"}, link=link)
    first, second = link.submitted
    assert isinstance(first, Generate)
    assert isinstance(second, Generate)
    assert first.max_new_tokens == second.max_new_tokens
    assert replace(first.sampling, seed=0) == replace(second.sampling, seed=0)
    assert (await refusal({"prompt": None}))["param"] == "prompt"
    assert (await refusal({}))["message"] == "prompt: missing"


async def _document(link: FakeLink) -> dict[str, Any]:
    async with make_client(link) as client:
        return (await client.get("/openapi.json")).json()


async def test_every_setting_reaches_the_engine_in_our_words():
    link = make_link()
    body = {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 7,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "frequency_penalty": -0.5,
        "presence_penalty": 2,
        "logit_bias": {"17": -100},
        "seed": 2**64 - 1,
        "stop_token_ids": [9, 5],
        "min_tokens": 2,
        "max_tokens": 3,
        "logprobs": 4,
        "timeout_s": 60,
    }
    await complete(link, prompt=[1, 2], **body)
    (message,) = link.submitted
    assert isinstance(message, Generate)
    assert asdict(message.sampling) == {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.75,
        "min_p": 0.25,
        "typical_p": 1,
        "repetition_penalty": 1.5,
        "frequency_penalty": -0.5,
        "presence_penalty": 2,
        "logit_bias": ((17, -100),),
        "end_ids": (5, 9),
        "min_new_tokens": 2,
        "num_top": 4,
        "seed": 2**64 - 1,
    }
    assert (message.max_new_tokens, message.timeout_s, message.prompt_extras) == (3, 60, None)


@pytest.mark.parametrize("top_k", [0, -1])
async def test_both_spellings_of_no_top_k_are_understood(top_k):
    link = make_link()
    await complete(link, prompt="a", top_k=top_k)
    assert isinstance(link.submitted[0], Generate)
    assert link.submitted[0].sampling.top_k == 0


@pytest.mark.parametrize("prompt", ["ab", ["ab", "c"], [97, 98], [[97, 98], [99]]])
async def test_all_forms_of_a_prompt_are_answered_by_a_choice_each(prompt):
    reply = await complete(prompt=prompt, echo=True, max_tokens=3)
    texts = (
        ["abThe", "cThe"] if len(prompt) == 2 and isinstance(prompt[0], str | list) and prompt != "ab" else ["abThe"]
    )
    assert [choice["text"] for choice in reply["choices"]] == texts
    assert [choice["index"] for choice in reply["choices"]] == list(range(len(texts)))
    assert reply["usage"]["prompt_tokens"] == len("".join(texts)) - 3 * len(texts)


async def test_the_choices_of_the_first_prompt_come_first_and_each_has_a_seed_of_its_own():
    reply = await complete(prompt=["a", "b"], n=2, max_tokens=4, temperature=1, seed=0, echo=True)
    assert [choice["text"] for choice in reply["choices"]] == ["aThe ", "ahe c", "bThe ", "bhe c"]
    assert reply["usage"] == {"prompt_tokens": 2, "completion_tokens": 16, "total_tokens": 18}


async def test_the_best_of_several_are_returned_and_all_are_counted():
    reply = await complete(prompt="a", n=1, best_of=3, max_tokens=3, temperature=1, seed=0)
    assert [choice["text"] for choice in reply["choices"]] == ["The"]  # its first sequence is the likeliest
    assert reply["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize(
    ("asked", "text", "reason"),
    [
        ({"stop": "."}, "The café is open", "stop"),
        ({"stop": ["Stop", "café"]}, "The ", "stop"),
        ({"stop_token_ids": [ord(".")]}, "The café is open", "stop"),
        ({"max_tokens": 3, "stop": "."}, "The", "length"),
    ],
)
async def test_what_ends_a_choice_is_told_and_not_part_of_its_text(asked, text, reason):
    body = {"prompt": "a", "max_tokens": 40} | asked
    plain = (await complete(**body))["choices"]
    assert [(choice["text"], choice["finish_reason"]) for choice in plain] == [(text, reason)]
    assert choices_of(await stream(**body)) == plain


async def test_the_end_of_the_model_is_a_stop():
    async with make_client(make_link(), eos_id=ord(".")) as client:
        asked = {"prompt": "a", "max_tokens": 40, "temperature": 0}
        reply = (await client.post(PATH, json=asked)).json()
        on = (await client.post(PATH, json={**asked, "ignore_eos": True})).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert on["choices"][0]["finish_reason"] == "length"


# refusals


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"suffix": "z"}, "suffix"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "logprobs": 1, "n": 2}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"300": 1}}, "logit_bias.300"),
        ({"stop_token_ids": [1, 300]}, "stop_token_ids.1"),
        ({"stop": ""}, "stop.0"),
        ({"stop": ["a", 1]}, "stop.1"),
        ({"stop": "a" * 70000}, "stop"),
        ({"prompt": [97, 300]}, "prompt.1"),
        ({"prompt": ["a", ""]}, "prompt.1"),
        ({"prompt": [97, -1]}, "prompt.1"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 300}, "prompt"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"min_tokens": 20}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"other": True}, "stream": True}, "stream_options.other"),
        ({"user": "u" * 300}, "user"),
        ({"top_k": -2}, "top_k"),
    ],
    ids=str,
)
async def test_what_cannot_be_done_is_refused_by_the_name_that_the_client_gave_it(asked, param):
    error = await refusal({"prompt": "a"} | asked)
    assert (error["param"], error["code"]) == (param, "invalid_field")
    assert error["message"].startswith(f"{param}: ")
    assert "parameters" not in error["message"]
    assert "new_tokens" not in error["message"]


async def test_another_model_is_not_found_here():
    error = await refusal({"prompt": "a", "model": "gpt-4"}, status=404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert '"tiny"' in error["message"]
    assert (await complete(prompt="a", model="tiny"))["model"] == "tiny"


async def test_a_full_queue_and_a_body_that_is_no_json_are_told_as_everywhere():
    link = make_link(hang_after=0)
    async with make_client(link, num_rows=1, max_waiting=1) as client:
        first = asyncio.create_task(client.post(PATH, json={"prompt": ["a", "b"]}))
        await eventually(lambda: link.num_hanging == 2)
        full = await client.post(PATH, json={"prompt": "c", "stream": True})
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        link.end_all("cancelled")
        await first
        assert (await client.post(PATH, content=b"{")).status_code == 400
        assert (await client.get(PATH)).status_code == 405


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_each_scored_prompt_counts_once_for_the_limit_of_sequences(max_tokens):
    async with make_client(make_link(), num_rows=2, max_waiting=1) as client:
        scored = {"prompt": ["a", "b", "c"], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
        assert (await client.post(PATH, json=scored)).status_code == 200
        reply = await client.post(PATH, json={**scored, "prompt": ["a", "b", "c", "d"]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "prompt")


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_prompt_that_is_scored_and_continued_is_read_once(streamed):
    link = make_link()
    body = {"prompt": ["ab", "cd"], "echo": True, "logprobs": 2, "max_tokens": 3, "n": 2, "stream": streamed}
    assert (await post(PATH, body, link=link)).status_code == 200
    assert [type(message) for message in link.submitted] == [Generate, Generate]
    assert [message.prompt_extras for message in link.submitted] == [Extras(num_top=2)] * 2


async def test_a_deadline_that_passes_before_any_token_is_a_408():
    link = make_link(hang_after=0)
    async with make_client(link) as client:
        request = asyncio.create_task(client.post(PATH, json={"prompt": "a", "timeout_s": 0.1}))
        await eventually(lambda: link.num_hanging)
        link.end_all("timeout")
        assert (await request).status_code == 408


async def test_the_log_tells_who_asked_and_no_text(caplog):
    with caplog.at_level(logging.INFO, logger="server.web.request_log"):
        await complete(prompt="secret", max_tokens=3, user="ann", echo=True, logprobs=0)
    fields = caplog.records[-1].fields
    assert (fields["path"], fields["user"], fields["prompt_tokens"], fields["generated_tokens"]) == (PATH, "ann", 6, 3)
    assert "secret" not in str(fields)


async def test_every_way_to_fail_is_documented_with_an_example():
    document = await _document(make_link())
    endpoint = document["paths"][PATH]["post"]
    assert set(endpoint["responses"]) == {*("200", "400", "404", "408", "413", "422", "429", "499", "500", "503")}
    for response in endpoint["responses"].values():
        content = response["content"]["application/json"]
        assert content.get("example") or content["examples"]
    examples = endpoint["requestBody"]["content"]["application/json"]["examples"]
    async with make_client(make_link(), num_rows=64) as client:
        for example in examples.values():
            body = {name: value for name, value in example["value"].items() if name != "model"}
            reply: httpx.Response = await client.post(PATH, json=body)
            assert reply.status_code == 200, example


def test_the_script_has_what_these_tests_rely_on():
    assert SCRIPT.startswith("The café is open. Stop here")

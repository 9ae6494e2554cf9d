import asyncio
from typing import Any

import numpy as np
import pytest

from server.protocol.messages import Extras, Generate
from tests.support.fake_link import FakeLink
from tests.support.http_harness import eventually, make_client, make_link, post, read_events

pytestmark = pytest.mark.anyio


def message(link: FakeLink) -> Generate:
    sent = link.submitted[-1]
    assert isinstance(sent, Generate)
    return sent


async def test_a_plain_reply_is_the_text_of_the_tokens():
    reply = await post("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 9}})
    assert reply.status_code == 200
    assert reply.json() == {"generated_text": "The café"}


async def test_details_tell_how_the_sequence_went():
    parameters = {"max_new_tokens": 3, "details": True, "seed": 2**64 - 1}
    details = (await post("/generate", {"inputs": "abc", "parameters": parameters})).json()["details"]
    tokens = [{"id": ord(char), "text": char, "logprob": -0.5, "special": False} for char in "The"]
    assert details == {
        "finish_reason": "length",
        "generated_tokens": 3,
        "prompt_tokens": 3,
        "seed": 2**64 - 1,
        "matched_stop": None,
        "logprob_sum": -1.5,
        "timings": {"queue_ms": 1.0, "prefill_ms": 2.0, "decode_ms": 3.0},
        "fingerprint": details["fingerprint"],
        "prefill": [],
        "tokens": tokens,
    }
    assert details["fingerprint"].startswith("abababababab-torch-float32-cpu-")


@pytest.mark.parametrize("stop", [None, ["Stop"], ["→"], ["n. S", "open"], ["\ufffd"]])
@pytest.mark.parametrize("max_new_tokens", [1, 7, 8, 39, 41, 60])
async def test_streamed_texts_joined_equal_the_plain_reply_byte_for_byte(stop, max_new_tokens):
    body = {"inputs": "x", "parameters": {"max_new_tokens": max_new_tokens, "stop": stop}}
    plain = (await post("/generate", body)).json()["generated_text"]
    events = read_events((await post("/generate", {**body, "stream": True})).text)
    assert "".join(event["token"]["text"] for event in events) == plain
    assert events[-1]["generated_text"] == plain
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))


async def test_only_the_last_event_has_the_text_and_the_details():
    reply = await post("/generate_stream", {"inputs": "x", "parameters": {"max_new_tokens": 3}})
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-accel-buffering"] == "no"
    *events, last = read_events(reply.text)
    assert events[0] == {
        "index": 1,
        "token": {"id": 84, "text": "T", "logprob": -0.5, "special": False},
        "generated_text": None,
        "details": None,
    }
    assert last["generated_text"] == "The"
    assert last["details"]["finish_reason"] == "length"
    assert "tokens" not in last["details"]


async def test_a_stop_string_frees_the_row_and_is_trimmed():
    link = make_link()
    parameters = {"max_new_tokens": 60, "stop": ["Stop"], "details": True}
    reply = (await post("/generate", {"inputs": "x", "parameters": parameters}, link=link)).json()
    assert reply["generated_text"] == "The café is open. "
    assert reply["details"]["finish_reason"] == "stop_sequence"
    assert reply["details"]["matched_stop"] == "Stop"
    assert link.cancelled == [message(link).id]


async def test_the_models_end_has_no_text_and_can_be_ignored():
    parameters = {"max_new_tokens": 5, "details": True}
    ended = (await post("/generate", {"inputs": "x", "parameters": parameters}, eos_id=ord("e"))).json()
    assert ended["generated_text"] == "Th"
    assert ended["details"]["finish_reason"] == "eos_token"
    assert ended["details"]["tokens"][-1] == {"id": 101, "text": "", "logprob": -0.5, "special": True}
    parameters["ignore_eos"] = True
    ignored = (await post("/generate", {"inputs": "x", "parameters": parameters}, eos_id=ord("e"))).json()
    assert ignored["generated_text"] == "The c"


async def test_a_stop_token_id_ends_the_text_and_is_reported():
    parameters = {"stop_token_ids": [ord("e")], "details": True}
    reply = (await post("/generate", {"inputs": "x", "parameters": parameters})).json()
    assert reply["generated_text"] == "Th"
    assert (reply["details"]["finish_reason"], reply["details"]["matched_stop"]) == ("stop_sequence", 101)


async def test_a_list_of_inputs_is_answered_in_order_and_streamed_with_sequence_numbers():
    body = {"inputs": ["a", "bb", "ccc"], "parameters": {"max_new_tokens": 2, "details": True}}
    replies = (await post("/generate", body)).json()
    assert [reply["details"]["prompt_tokens"] for reply in replies] == [1, 2, 3]
    events = read_events((await post("/generate", {**body, "stream": True})).text)
    assert sorted((event["sequence"], event["index"]) for event in events) == [(s, i) for s in range(3) for i in (1, 2)]
    ends = {event["sequence"]: event["details"]["prompt_tokens"] for event in events if event["details"]}
    assert ends == {0: 1, 1: 2, 2: 3}


async def test_ids_are_taken_as_prompts_and_truncate_keeps_the_last_ones():
    link = make_link()
    parameters = {"max_new_tokens": 2, "truncate": 2, "return_full_text": True}
    reply = await post("/generate", {"inputs": [97, 98, 99], "parameters": parameters}, link=link)
    assert reply.json() == {"generated_text": "abcTh"}
    assert np.frombuffer(message(link).tokens, dtype="<i4").tolist() == [98, 99]
    assert len((await post("/generate", {"inputs": [[97], [98]], "parameters": {"max_new_tokens": 1}})).json()) == 2


async def test_generation_is_greedy_unless_sampling_is_asked_for():
    async def sampling(**parameters: Any) -> Any:
        link = make_link()
        await post("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 1, **parameters}}, link=link)
        return message(link).sampling

    assert (await sampling()).temperature == 0
    assert (await sampling(temperature=0, top_k=5)).temperature == 0
    assert (await sampling(do_sample=True)).temperature == 1
    asked = await sampling(top_k=5, top_p=0.5, min_p=0.25, seed=7)
    assert (asked.temperature, asked.top_k, asked.top_p, asked.min_p, asked.seed) == (1, 5, 0.5, 0.25, 7)
    assert (await sampling(typical_p=0.5)).temperature == 1
    assert (await sampling()).seed != (await sampling()).seed


async def test_the_engine_is_told_of_every_field():
    link = make_link()
    asked = {
        "temperature": 0.5,
        "typical_p": 0.25,
        "repetition_penalty": 1.5,
        "frequency_penalty": -1,
        "presence_penalty": 2,
        "logit_bias": {"17": 3, "0": -100},
        "stop_token_ids": [9, 5],
        "min_new_tokens": 2,
        "max_new_tokens": 4,
        "top_n_tokens": 3,
        "details": True,
        "decoder_input_details": True,
    }
    await post("/generate", {"inputs": "x", "parameters": asked, "timeout_s": 2.5}, link=link, eos_id=7, timeout_s=9)
    told, sampling = message(link), message(link).sampling
    assert (told.max_new_tokens, told.timeout_s, told.prompt_extras) == (4, 2.5, Extras())
    assert (sampling.temperature, sampling.typical_p, sampling.repetition_penalty) == (0.5, 0.25, 1.5)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (-1, 2)
    assert dict(sampling.logit_bias) == {17: 3, 0: -100}
    assert (sampling.end_ids, sampling.min_new_tokens, sampling.num_top) == ((5, 7, 9), 2, 3)
    await post("/generate", {"inputs": "x", "parameters": {"ignore_eos": True}}, link=link, eos_id=7, timeout_s=9)
    assert (message(link).sampling.end_ids, message(link).timeout_s) == ((), 9)


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"logit_bias": {"3": 1, "300": 1}}, "parameters.logit_bias.300"),
        ({"stop_token_ids": [256]}, "parameters.stop_token_ids.0"),
        ({"top_n_tokens": 1}, "parameters.top_n_tokens"),
        ({"n": 2}, "parameters.n"),
    ],
)
async def test_what_does_not_fit_the_model_or_the_reply_is_refused(parameters, param):
    link = make_link()
    reply = await post("/generate", {"inputs": "x", "parameters": parameters}, link=link)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, param)
    assert not link.submitted


async def test_a_stream_without_a_limit_lasts_until_something_ends_it():
    body = {"inputs": "x", "stream": True, "parameters": {"max_new_tokens": None, "stop": ["→ The"]}}
    assert read_events((await post("/generate", body)).text)[-1]["details"]["matched_stop"] == "→ The"


async def test_a_shutdown_ends_a_stream_with_what_was_held_back():
    link = make_link(hang_after=5)
    async with make_client(link) as client:
        body = {"inputs": "x", "stream": True, "parameters": {"stop": ["e caf\u00e9!"]}}
        request = asyncio.create_task(client.post("/generate", json=body))
        await eventually(lambda: link.num_hanging)
        link.end_all("shutdown")
        *events, last = read_events((await request).text)
    assert "".join(event["token"]["text"] for event in events) == "Th"
    assert (last["index"], last["token"], last["generated_text"]) == (5, None, "The c")
    assert last["details"]["finish_reason"] == "shutdown"


@pytest.mark.parametrize("stream", [False, True])
async def test_of_a_list_each_text_says_that_its_time_was_up(stream):
    link = make_link(hang_after=0)
    async with make_client(link) as client:
        body = {"inputs": ["a", "b"], "stream": stream, "parameters": {"details": True}}
        request = asyncio.create_task(client.post("/generate", json=body))
        await eventually(lambda: link.num_hanging == 2)
        link.end_all("timeout")
        reply = await request
    answers = read_events(reply.text) if stream else reply.json()
    assert [(one["generated_text"], one["details"]["finish_reason"]) for one in answers] == [("", "timeout")] * 2

import asyncio
from typing import Any

import numpy as np
import pytest
from fake_link import FakeLink, fake_logprobs
from http_harness import eventually, make_client, make_link, post, read_events

from model.scoring import Score as Figures
from model.tokenizer import BytesTokenizer
from server.messages import Generate

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def message(link: FakeLink) -> Generate:
    sent = link.submitted[-1]
    assert isinstance(sent, Generate)
    return sent


# /generate


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
        "tokens": tokens,
    }
    assert details["fingerprint"].startswith("abababababab-float32-cpu-")


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
    assert (await sampling()).seed != (await sampling()).seed


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


# /score


async def test_a_document_is_scored_in_the_units_of_the_shared_function():
    text = "It was a dark night, ça va."
    reply = (await post("/score", {"inputs": text})).json()
    tokens = list(text.encode())[1:]
    figures = Figures.of(BytesTokenizer(), tokens, fake_logprobs(np.array(tokens)).tolist())
    for name in ("num_tokens", "num_bytes", "num_chars", "num_words", "logprob", "perplexity", "bits_per_char"):
        assert reply[name] == getattr(figures, name)
    assert reply["is_greedy"] is False
    assert "tokens" not in reply


@pytest.mark.parametrize(("prefix", "num_prefix"), [("\n\n", 2), (10, 1)])
async def test_a_prefix_gives_the_first_token_a_score_and_is_not_scored_itself(prefix, num_prefix):
    link = make_link()
    reply = (await post("/score", {"inputs": "abc", "prefix": prefix, "return": ["tokens"]}, link=link)).json()
    assert len(link.submitted[0].tokens) == 4 * (3 + num_prefix)
    assert [token["logprob"] for token in reply["tokens"]] == fake_logprobs(np.array([97, 98, 99])).tolist()
    assert (reply["num_tokens"], reply["num_bytes"]) == (3, 3)


async def test_the_first_token_has_no_score_without_a_prefix():
    tokens = (await post("/score", {"inputs": "aé", "return": ["tokens"]})).json()["tokens"]
    assert tokens[0] == {"id": 97, "text": "a", "logprob": None, "rank": None}
    assert [token["text"] for token in tokens] == ["a", "", "é"]
    assert tokens[1]["rank"] == 0xC3 % 3


async def test_a_text_of_one_token_has_no_figures():
    reply = (await post("/score", {"inputs": "a"})).json()
    assert (reply["num_tokens"], reply["logprob"], reply["perplexity"]) == (0, 0.0, None)


async def test_a_long_document_is_scored_whole():
    text = "0123456789" * 30_000
    reply = (await post("/score", {"inputs": text})).json()
    assert reply["num_bytes"] == len(text) - 1


async def test_several_documents_are_scored_in_order():
    replies = (await post("/score", {"inputs": ["a b", "a b c d"]})).json()
    assert [reply["num_words"] for reply in replies] == [1, 3]  # the first token is not scored


async def test_a_shutdown_refuses_what_was_not_scored_to_the_end():
    link = make_link(hang_after=0)
    async with make_client(link) as client:
        request = asyncio.create_task(client.post("/score", json={"inputs": "abc"}))
        await eventually(lambda: link.submitted)
        link.end_all("shutdown")
        assert (await request).status_code == 503

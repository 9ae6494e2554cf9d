"""Tests of several sequences for an input, details of tokens, and endings from outside, over a fake engine."""

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest

from server.app import create_app
from server.config import Settings
from server.protocol.messages import Generate
from tests.support.fake_link import FakeLink, fake_logprobs
from tests.support.http_harness import SCRIPT, eventually, make_bundle, make_client, make_link, post, read_events

pytestmark = pytest.mark.anyio


def body(inputs: Any = "x", *, stream: bool = False, **parameters: Any) -> dict[str, Any]:
    return {"inputs": inputs, "stream": stream, "parameters": {"max_new_tokens": 4, **parameters}}


def sampled(inputs: Any = "x", *, stream: bool = False, **parameters: Any) -> dict[str, Any]:
    return body(inputs, stream=stream, do_sample=True, seed=3, **parameters)


async def generate(asked: dict[str, Any], *, link: FakeLink | None = None) -> Any:
    reply = await post("/generate", asked, link=link)
    assert reply.status_code == 200, reply.text
    return read_events(reply.text) if asked["stream"] else reply.json()


async def interrupted(asked: dict[str, Any], *, after: int, finish_reason: str) -> httpx.Response:
    """Return the reply to a request whose sequences the engine ends after `after` tokens."""
    link = make_link(hang_after=after)
    async with make_client(link) as client:
        request = asyncio.create_task(client.post("/generate", json=asked))
        await eventually(lambda: link.num_hanging)
        link.end_all(finish_reason)
        return await request


# n and best_of


async def test_n_sequences_are_one_message_and_come_in_order_as_an_array():
    link = make_link()
    replies = await generate(sampled(n=3, details=True), link=link)
    texts = [SCRIPT.encode()[start : start + 4].decode(errors="replace") for start in (3, 4, 5)]
    assert [reply["generated_text"] for reply in replies] == texts
    assert [reply["details"]["seed"] for reply in replies] == [3, 4, 5]
    (told,) = link.submitted
    assert isinstance(told, Generate)
    assert [seed for _, seed in told.forks] == [4, 5]
    assert len(set(told.ids)) == 3


async def test_each_of_n_sequences_is_given_again_by_its_own_seed_alone():
    for reply in await generate(sampled(n=4, details=True)):
        again = await generate({**body(do_sample=True, seed=reply["details"]["seed"]), "stream": False})
        assert again["generated_text"] == reply["generated_text"]


async def test_seeds_wrap_at_64_bits():
    replies = await generate(body(do_sample=True, seed=2**64 - 1, n=2, details=True))
    assert [reply["details"]["seed"] for reply in replies] == [2**64 - 1, 0]


async def test_replies_and_sequence_numbers_of_several_inputs_are_input_major():
    replies = await generate(sampled(["a", "bb"], n=2, details=True))
    assert [(one["details"]["prompt_tokens"], one["details"]["seed"]) for one in replies] == [
        (1, 3),
        (1, 4),
        (2, 3),
        (2, 4),
    ]
    events = await generate(sampled(["a", "bb"], n=2, stream=True))
    ends = {event["sequence"]: event for event in events if event["details"]}
    assert [ends[i]["details"]["prompt_tokens"] for i in range(4)] == [1, 1, 2, 2]
    assert [ends[i]["generated_text"] for i in range(4)] == [reply["generated_text"] for reply in replies]


async def test_streams_of_one_input_are_numbered_where_there_are_several():
    events = await generate(sampled(n=2, stream=True))
    assert sorted((event["sequence"], event["index"]) for event in events) == [
        (s, i) for s in (0, 1) for i in range(1, 5)
    ]


class UnevenLink(FakeLink):
    """A fake engine that gives a higher probability to a sequence with a higher seed."""

    def submit(self, message: Any) -> Any:
        streams = super().submit(message)
        for place, stream in enumerate(streams):
            put = stream.put

            def better(said: Any, put: Any = put, place: int = place) -> bool:
                logprob = getattr(said, "logprob", None)
                if logprob is None:
                    return put(said)
                return put(type(said)(said.sequence, said.token, -1 / (1 + place), said.top))

            stream.put = better
        return streams


async def test_the_best_of_several_are_returned_best_first():
    link = UnevenLink(list(SCRIPT.encode()))
    replies = await generate(sampled(["a", "b"], n=2, best_of=4, details=True), link=link)
    assert [reply["details"]["seed"] for reply in replies] == [6, 5, 6, 5]
    one = await generate(sampled(best_of=3, details=True), link=UnevenLink(list(SCRIPT.encode())))
    assert one["details"]["seed"] == 5


async def test_sequences_count_against_admission_and_all_are_let_go():
    link = make_link(hang_after=0)
    async with make_client(link, num_rows=2, max_waiting=2) as client:
        reply = await client.post("/generate", json=sampled(["a", "b", "c"], n=2))
        assert (reply.status_code, reply.json()["error"]["code"]) == (422, "invalid_field")
        request = asyncio.create_task(client.post("/generate", json=sampled(["a", "b"], n=2)))
        await eventually(lambda: link.num_hanging == 4)
        assert (await client.post("/generate", json=body())).status_code == 429
        link.end_all("cancelled")
        await request
        link.hang_after = None
        assert (await client.post("/generate", json=sampled(["a", "b"], n=2))).status_code == 200


async def test_prompt_tokens_of_n_sequences_count_once(caplog):
    async with make_client(make_link()) as client:
        with caplog.at_level("INFO"):
            await client.post("/generate", json=sampled("abc", n=4))
        metrics = (await client.get("/metrics")).text.splitlines()
    fields = next(record.fields for record in caplog.records if getattr(record, "fields", {}).get("sequences"))
    assert (fields["sequences"], fields["prompt_tokens"], fields["generated_tokens"]) == (4, 3, 16)
    assert "allattn_prompt_tokens_total 3.0" in metrics
    assert "allattn_generation_tokens_total 16.0" in metrics


# details


async def test_details_of_the_prompt_split_no_character_and_the_first_token_has_no_figure():
    details = (await generate(body("aé", details=True, decoder_input_details=True)))["details"]
    figures = fake_logprobs(np.array(list("é".encode()))).tolist()
    assert details["prefill"] == [
        {"id": 97, "text": "a", "logprob": None},
        {"id": 0xC3, "text": "", "logprob": figures[0]},
        {"id": 0xA9, "text": "é", "logprob": figures[1]},
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_all_sequences_of_an_input_report_its_prompt_however_long(stream):
    text = "0123456789" * 250  # several messages from the engine
    answer = await generate(sampled(text, n=3, details=True, decoder_input_details=True, stream=stream))
    details = [entry["details"] for entry in answer if entry["details"]]
    assert len(details) == 3
    for one in details:
        assert "".join(token["text"] for token in one["prefill"]) == text
        assert [token["logprob"] for token in one["prefill"][1:]] == fake_logprobs(
            np.array(list(text.encode()[1:]))
        ).tolist()


async def test_the_prompt_that_is_told_is_the_one_that_was_read():
    asked = body("abcdef", details=True, decoder_input_details=True, truncate=2)
    assert [token["text"] for token in (await generate(asked))["details"]["prefill"]] == ["e", "f"]


async def test_the_most_probable_tokens_are_told_beside_each_one_plainly_and_streamed():
    details = (await generate(body(details=True, top_n_tokens=2)))["details"]
    assert len(details["top_tokens"]) == len(details["tokens"]) == 4
    assert details["top_tokens"][0] == [
        {"id": 84, "text": "T", "logprob": -0.5, "special": False},
        {"id": 85, "text": "U", "logprob": -1.5, "special": False},
    ]
    events = await generate(body(top_n_tokens=2, stream=True))
    assert [event["top_tokens"] for event in events] == details["top_tokens"]


async def test_a_part_of_a_character_among_the_most_probable_is_a_replacement_character():
    link = FakeLink([0xC3])
    details = (await generate(body(details=True, top_n_tokens=1, max_new_tokens=1), link=link))["details"]
    assert details["top_tokens"][0][0]["text"] == "\ufffd"


async def test_figures_can_be_left_out():
    details = (await generate(body(details=True, logprobs=False)))["details"]
    assert [token["logprob"] for token in details["tokens"]] == [None] * 4
    assert details["logprob_sum"] == -2.0
    assert {event["token"]["logprob"] for event in await generate(body(logprobs=False, stream=True))} == {None}


async def test_a_stop_string_does_not_end_what_is_shorter_than_asked_for():
    asked = body(stop=["e"], max_new_tokens=40, details=True)
    assert (await generate(asked))["generated_text"] == "Th"
    asked["parameters"]["min_new_tokens"] = 3
    reply = await generate(asked)
    assert reply["generated_text"] == "The café is op"
    assert reply["details"]["matched_stop"] == "e"


# endings


@pytest.mark.parametrize("finish_reason", ["cancelled", "timeout", "shutdown"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_ending_from_outside_leaves_the_text_so_far(finish_reason, stream):
    reply = await interrupted(body(details=True, stream=stream), after=3, finish_reason=finish_reason)
    last = read_events(reply.text)[-1] if stream else reply.json()
    assert last["generated_text"] == "The"
    assert last["details"]["finish_reason"] == finish_reason
    assert last["details"]["generated_tokens"] == 3


async def test_a_deadline_that_passes_before_the_first_token_is_an_error():
    plain = await interrupted(body(), after=0, finish_reason="timeout")
    assert (plain.status_code, plain.json()["error"]["code"]) == (408, "timeout")
    streamed = await interrupted(body(stream=True), after=0, finish_reason="timeout")
    assert streamed.status_code == 200
    assert [event["error"]["code"] for event in read_events(streamed.text)] == ["timeout"]


async def test_what_is_cancelled_before_its_first_token_has_an_empty_text():
    asked = sampled("abc", n=2, details=True, decoder_input_details=True)
    for reply in (await interrupted(asked, after=0, finish_reason="cancelled")).json():
        assert (reply["generated_text"], reply["details"]["generated_tokens"]) == ("", 0)
        assert reply["details"]["tokens"] == []
        assert len(reply["details"]["prefill"]) == 3


async def test_a_request_has_the_id_of_its_body_and_can_be_cancelled_by_it():
    link = make_link(hang_after=2)
    async with make_client(link) as client:
        asked = {**sampled(n=2, details=True), "request_id": "mine-1"}
        request = asyncio.create_task(client.post("/generate", json=asked, headers={"X-Request-Id": "header"}))
        await eventually(lambda: link.num_hanging == 2)
        assert (await client.delete("/requests/mine-1")).json() == {"request_id": "mine-1", "cancelled": 2}
        reply = await request
    assert reply.headers["x-request-id"] == "mine-1"
    assert [one["details"]["finish_reason"] for one in reply.json()] == ["cancelled"] * 2


async def test_the_root_answers_as_generate_does():
    assert (await post("/", body())).json() == await generate(body())


# bursts of messages


class BurstLink(FakeLink):
    """A fake engine whose messages for a sequence all arrive together, before anything has read them."""

    def submit(self, message: Any) -> Any:
        streams = super().submit(message)
        for stream in streams:
            stream.put = _delayed(stream.put)
        return streams


def _delayed(put: Any) -> Any:
    waiting: list[Any] = []

    def put_all_at_the_end(said: Any) -> bool:
        waiting.append(said)
        return not hasattr(said, "finish_reason") or all(map(put, waiting))

    return put_all_at_the_end


@pytest.mark.parametrize("stop", [None, ["open"], ["→"]])
async def test_a_burst_gives_the_same_events_as_tokens_one_by_one(stop):
    asked = body(stream=True, stop=stop, max_new_tokens=60, top_n_tokens=1)
    expected = await generate(asked)
    burst = await generate(asked, link=BurstLink(list(SCRIPT.encode())))
    for event in (expected[-1], burst[-1]):
        event["details"]["seed"] = 0  # the seed is random
    assert burst == expected


async def exchange(link: FakeLink, asked: dict[str, Any], *, stays: bool = True) -> list[bytes]:
    """Return the parts of the answer as the application sends them. stays=False: the client leaves after asking."""
    sent: list[bytes] = []
    said = iter([{"type": "http.request", "body": json.dumps(asked).encode(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        if message := next(said, None):
            return message
        if stays:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    app = create_app(settings=Settings(), bundle=make_bundle(), link=link)
    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "query_string": b""}
    await app(scope, receive, send)
    return sent


async def test_a_burst_is_sent_in_one_piece():
    parts = await exchange(BurstLink(list(SCRIPT.encode())), body(stream=True))
    assert [part.count(b"data: ") for part in parts if part] == [4]


@pytest.mark.parametrize("stream", [False, True])
async def test_all_rows_are_freed_where_the_client_left_before_anybody_waited_for_them(stream):
    link = make_link(hang_after=1)
    await exchange(link, sampled(["a", "b"], n=2, stream=stream), stays=False)
    assert sorted(link.cancelled) == sorted(name for message in link.submitted for name in message.ids)
    assert len(link.cancelled) == 4

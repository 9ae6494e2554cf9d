"""Tests of the logprobs of POST /v1/completions: how streams add up to the plain replies; over a fake engine."""

import asyncio
import json
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import BytesTokenizer
from server.app import create_app
from server.config import Settings
from server.dialects.openai.logprobs import LogprobLister
from server.link.mailbox import Stream
from server.protocol.messages import Extras, Generate, Score
from server.requests.results import OutputToken
from tests.support.completion_harness import PATH, choices_of, complete, read_chunks, stream
from tests.support.fake_link import FakeLink, fake_logprobs
from tests.support.http_harness import SCRIPT, eventually, make_bundle, make_client, make_link

pytestmark = pytest.mark.anyio


async def test_logprobs_are_four_lists_over_the_completion():
    (choice,) = (await complete(prompt="x", max_tokens=6, logprobs=2))["choices"]
    lists = choice["logprobs"]
    assert lists["tokens"] == ["T", "h", "e", " ", "c", "a"]
    assert lists["token_logprobs"] == [-0.5] * 6
    assert lists["top_logprobs"][:2] == [{"T": -0.5, "U": -1.5}, {"h": -0.5, "i": -1.5}]
    assert lists["text_offset"] == list(range(6))


async def test_with_echo_they_cover_the_prompt_exactly_and_its_first_entry_is_null():
    link = make_link()
    (choice,) = (await complete(link, prompt="abc", max_tokens=1, logprobs=1, echo=True))["choices"]
    scores = fake_logprobs(np.frombuffer(b"bc", dtype="u1").astype("i4")).tolist()
    assert choice["text"] == "abcT"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c", "T"],
        "token_logprobs": [None, *scores, -0.5],
        "top_logprobs": [None, {"b": scores[0]}, {"c": scores[1]}, {"T": -0.5}],
        "text_offset": [0, 1, 2, 3],
    }
    (told,) = link.submitted
    assert isinstance(told, Generate)
    assert told.prompt_extras == Extras(num_top=1)


async def test_without_max_tokens_the_prompts_are_scored_and_nothing_is_generated():
    link = make_link()
    reply = await complete(link, prompt=["abc", "d"], max_tokens=0, logprobs=0, echo=True)
    assert all(isinstance(message, Score) for message in link.submitted)
    assert [choice["text"] for choice in reply["choices"]] == ["abc", "d"]
    assert [len(choice["logprobs"]["tokens"]) for choice in reply["choices"]] == [3, 1]
    assert reply["choices"][1]["logprobs"]["token_logprobs"] == [None]
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"length"}
    assert reply["usage"] == {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4}


async def test_parts_of_a_character_have_names_of_their_own_and_offsets_within_the_text():
    link = make_link()
    (choice,) = (await complete(link, prompt="é→x", max_tokens=9, logprobs=3, echo=True))["choices"]
    lists, text = choice["logprobs"], choice["text"]
    arrow = [f"bytes:\\x{byte:02x}" for byte in "→".encode()]
    assert lists["tokens"][:6] == ["bytes:\\xc3", "bytes:\\xa9", *arrow, "x"]
    assert lists["text_offset"][:6] == [0, 0, 1, 1, 1, 2]
    assert text == "é→xThe café"
    assert [len(top) for top in lists["top_logprobs"][1:]] == [3] * 14  # no two tokens have the same name
    for name, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert name.startswith("bytes:") or text[offset] == name


async def test_a_character_that_the_prompt_leaves_open_does_not_move_the_offsets():
    (choice,) = (await complete(prompt=[0xE2, 97, 0xE2], max_tokens=2, logprobs=0, echo=True))["choices"]
    assert choice["text"] == "\ufffda\ufffdTh"
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


@given(ids=st.lists(st.sampled_from([*"aé→🙂\ufffd".encode(), 0xFF, 0x80])), before=st.integers(0, 3))
def test_every_whole_token_is_in_the_text_where_its_offset_says(ids, before):
    tokenizer = BytesTokenizer()
    lister = LogprobLister(tokenizer, offset=before)
    for token in ids:
        lister.add(OutputToken(token, "", -1.0, special=False), top=())
    lists, text = lister.take(), "." * before + tokenizer.decode(ids)
    assert lists.text_offset == sorted(lists.text_offset)
    assert all(before <= offset < len(text) for offset in lists.text_offset)
    for name, offset in zip(lists.tokens, lists.text_offset, strict=True):
        assert name.startswith("bytes:") or text[offset] == name


# streams


@pytest.mark.parametrize(
    ("echo", "logprobs", "max_tokens"), [*product((False, True), (None, 0, 2), (1, 9, 41)), (True, 0, 0), (True, 2, 0)]
)
async def test_a_stream_adds_up_to_the_plain_reply(echo, logprobs, max_tokens):
    body = {"prompt": ["é", "→b"], "echo": echo, "logprobs": logprobs, "max_tokens": max_tokens, "stop": "here"}
    plain = await complete(**body)
    chunks = await stream(**body, stream_options={"include_usage": True})
    assert choices_of(chunks) == plain["choices"]
    *others, last = chunks
    assert (last["choices"], last["usage"]) == ([], plain["usage"])
    assert all(chunk["usage"] is None for chunk in others)
    assert {(chunk["id"], chunk["object"], chunk["model"]) for chunk in chunks} == {
        (chunks[0]["id"], "text_completion", "tiny")
    }


async def test_a_stream_of_several_choices_tells_them_apart():
    body = {"prompt": ["a", "b"], "n": 2, "temperature": 1, "seed": 5, "max_tokens": 12, "echo": True, "logprobs": 1}
    assert choices_of(await stream(**body)) == (await complete(**body))["choices"]


async def test_without_include_usage_no_event_has_any():
    assert all("usage" not in chunk for chunk in await stream(prompt="a"))
    chunks = await stream(prompt="a", stream_options={"include_usage": False})
    assert all("usage" not in chunk for chunk in chunks)


async def test_a_stream_that_is_cut_off_gives_all_of_its_text():
    link = make_link(hang_after=8)  # in the middle of the bytes of é
    async with make_client(link) as client:
        body = {"prompt": "a", "stream": True, "request_id": "mine", "temperature": 0}
        request = asyncio.create_task(client.post(PATH, json=body))
        await eventually(lambda: link.num_hanging)
        assert (await client.delete("/requests/mine")).json()["cancelled"] == 1
        chunks = read_chunks((await request).text)
    (choice,) = choices_of(chunks)
    assert (choice["text"], choice["finish_reason"]) == ("The caf\ufffd", "length")
    assert chunks[0]["id"] == "cmpl-mine"


async def test_a_failure_in_a_stream_is_one_last_error_event():
    link = make_link(hang_after=2)
    async with make_client(link) as client:
        request = asyncio.create_task(client.post(PATH, json={"prompt": ["a", "b"], "stream": True}))
        await eventually(lambda: link.num_hanging == 2)
        link.end_all("error", error="not finite")
        text = (await request).text
    assert "[DONE]" not in text
    assert json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "internal"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_leaves_frees_every_row(streamed):
    link = make_link(hang_after=1)
    async with make_client(link) as client:
        body = {"prompt": ["ab", "cd"], "echo": True, "logprobs": 0, "stream": streamed}
        request = asyncio.create_task(client.post(PATH, json=body))
        await eventually(lambda: len(link.submitted) == 2)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await eventually(lambda: len(link.cancelled) == 2)
        link.hang_after = None
        assert (await client.post(PATH, json=body)).status_code == 200


class CancellingLink(FakeLink):
    """A link that cancels the task that submits, so that nothing waits for the new sequences."""

    def submit(self, message: Generate | Score) -> list[Stream]:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return super().submit(message)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_request_that_ends_before_anybody_waits_for_its_rows_frees_them(streamed):
    link = CancellingLink(list(SCRIPT.encode()), hang_after=1)
    app = create_app(settings=Settings(), bundle=make_bundle(), link=link)
    body = json.dumps({"prompt": ["ab", "cd"], "echo": True, "logprobs": 0, "stream": streamed}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        await asyncio.sleep(0)

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "query_string": b""}
    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(app(scope, receive, send))
    assert len(link.cancelled) == len(link.submitted) == 2

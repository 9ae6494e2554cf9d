import asyncio
import math
import tracemalloc
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from model.scoring import RunningFigures
from model.scoring import TextFigures as Figures
from model.tokenizer import BytesTokenizer
from server.config import Settings
from server.dialects.score.replies import score_event
from server.dialects.score.schema import ScoreRequest
from server.protocol.json import encode_event
from server.protocol.messages import Ended, Extras
from server.requests.results import ScoreOutput
from server.requests.scoring import Document, Scoring, ScoringPlan
from server.requests.service import Service
from tests.support.fake_link import TIMINGS, FakeLink, fake_logprobs, fake_scores
from tests.support.http_harness import eventually, make_bundle, make_client, make_link, read_events

pytestmark = pytest.mark.anyio

PER_UNIT = ["perplexity", "word_perplexity", "bits_per_token", "bits_per_byte", "bits_per_char"]
FIGURES = ["num_tokens", "num_bytes", "num_chars", "num_words", "logprob", *PER_UNIT]


async def score(link: FakeLink | None = None, **body: Any) -> Any:
    reply = await post(link, **body)
    assert reply.status_code == 200, reply.text
    return read_events(reply.text) if body.get("stream") else reply.json()


async def post(link: FakeLink | None = None, **body: Any) -> httpx.Response:
    async with make_client(link or make_link()) as client:
        return await client.post("/score", json=body)


def ids_in(raw: bytes) -> np.ndarray:
    return np.frombuffer(raw, dtype="<i4")


def ids_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype("<i4")


def expected(tokens: np.ndarray) -> dict[str, Any]:
    """Return the figures that /score must give; they are exact, since the fake's log-probabilities are quarters."""
    figures = Figures.of(BytesTokenizer(), tokens.tolist(), fake_logprobs(tokens).tolist())
    return {name: None if getattr(figures, name) == math.inf else getattr(figures, name) for name in FIGURES}


def figures_in(reply: dict[str, Any]) -> dict[str, Any]:
    return {name: reply[name] for name in FIGURES}


def start(link: Any, tokens: np.ndarray, *, context: str = "") -> Scoring:
    """Return a live sequence without HTTP around it."""
    service = Service(Settings(), bundle=make_bundle(), link=link)
    document = Document(ids_of(context), (tokens,))
    num_scored = len(tokens) if context else len(tokens) - 1
    plan = ScoringPlan(tokens=tokens, num_scored=num_scored, lists_tokens=False, extras=Extras())
    message = document.message(service.new_id, extras=Extras(), timeout_s=None)
    (live,) = service.submit([message], request_id="mine-1")
    return Scoring(plan, live=live, service=service)


# figures


@pytest.mark.parametrize("chunk", [1, 3, 1000])
async def test_a_document_is_scored_in_the_units_of_the_shared_function(chunk):
    text = "It was a dark  night, ça va → là.\n"
    reply = await score(make_link(chunk=chunk), inputs=text)
    assert figures_in(reply) == expected(ids_of(text)[1:])
    assert reply["is_greedy"] is False
    assert "tokens" not in reply


@given(st.lists(st.integers(1, 5)), st.text(" \n\tab\x0b\x1cé→", max_size=30))
def test_sums_over_stretches_are_the_sums_over_the_whole(sizes, text):
    tally, tokens = RunningFigures(BytesTokenizer()), ids_of(text)
    for part in np.split(tokens, np.cumsum(sizes)):  # parts begin and end within characters too
        tally.add(part.tolist(), fake_logprobs(part).tolist())
    assert {name: getattr(tally.score, name) for name in FIGURES} == expected(tokens)


@pytest.mark.parametrize("unit", ["token", "byte", "char", "word"])
async def test_perplexity_is_per_the_unit_and_nothing_else_changes(unit):
    text = "ça va là → bon"
    plain, reply = await score(inputs=text), await score(inputs=text, unit=unit)
    assert reply["perplexity"] == pytest.approx(math.exp(-reply["logprob"] / reply[f"num_{unit}s"]))
    assert {**plain, "perplexity": 0} == {**reply, "perplexity": 0}


async def test_a_text_of_first_choices_is_greedy():
    assert (await score(inputs="xccc"))["is_greedy"] is True
    assert (await score(inputs="xccd"))["is_greedy"] is False


@pytest.mark.parametrize(("prefix", "num_prefix"), [("\n\n", 2), (10, 1)])
async def test_a_prefix_gives_the_first_token_a_score_and_is_not_scored_itself(prefix, num_prefix):
    link = make_link()
    reply = await score(link, inputs="abc", prefix=prefix, **{"return": ["tokens"]})
    assert ids_in(link.submitted[0].tokens).tolist() == [10] * num_prefix + [97, 98, 99]
    assert link.submitted[0].num_shared == num_prefix - 1
    assert [token["logprob"] for token in reply["tokens"]] == fake_logprobs(ids_of("abc")).tolist()
    assert (reply["num_tokens"], reply["num_bytes"]) == (3, 3)


async def test_a_text_of_one_token_has_no_figures():
    reply = await score(inputs="a", **{"return": ["tokens"]})
    assert (reply["num_tokens"], reply["logprob"], reply["perplexity"]) == (0, 0.0, None)
    assert reply["tokens"] == [{"id": 97, "text": "a", "logprob": None, "rank": None}]
    (event,) = await score(inputs="a", stream=True)
    assert (event["index"], event["num_tokens"], event["reply"]["num_tokens"]) == (0, 0, 0)


async def test_a_long_document_is_scored_whole():
    text = "0123456789" * 30_000
    assert figures_in(await score(inputs=text)) == expected(ids_of(text)[1:])


async def test_several_documents_are_scored_in_order():
    replies = await score(inputs=["a b", "a b c d"])
    assert [reply["num_words"] for reply in replies] == [1, 3]  # the first token is not scored
    assert await score(inputs=[[97, 32, 98], [97]]) == await score(inputs=["a b", "a"])


async def test_memory_does_not_grow_with_a_document_whose_tokens_are_not_listed():
    num = 200_000

    class Endless:
        left = num

        async def take(self) -> list[Any]:
            if not self.left:
                return [Ended("1", "scored", TIMINGS)]
            self.left -= 1000
            return [fake_scores("1", np.full(1000, 97))]

    link: Any = make_link()
    link.submit = lambda message: [Endless()]
    scoring = start(link, np.full(num, 97, dtype="<i4"), context="\n")
    tracemalloc.start()
    try:
        score, _ = await scoring.fold(encode=lambda _: b"")
        assert tracemalloc.get_traced_memory()[1] < num
    finally:
        tracemalloc.stop()
    assert score.figures.num_tokens == num


# continuations


async def test_continuations_are_what_they_add_to_the_context():
    context, continuations = "It was a", [" dark night", "é", " bright day"]
    replies = await score(inputs=context, continuations=continuations)
    before = await score(inputs=context)
    for text, reply in zip(continuations, replies, strict=True):
        whole = await score(inputs=context + text)
        for name in ("logprob", "num_tokens", "num_bytes", "num_chars"):
            assert reply[name] == pytest.approx(whole[name] - before[name])
        assert figures_in(reply) == expected(ids_of(text))


async def test_the_context_is_told_to_the_engine_once():
    link = make_link()
    await score(link, inputs=["abc", "d"], continuations=[["x", "yz", "w"], ["v"]], prefix="\n")
    first, second = link.submitted
    assert (ids_in(first.tokens).tolist(), first.num_shared) == ([10, 97, 98, 99, 120], 3)
    assert [ids_in(tokens).tolist() for _, tokens in first.forks] == [[99, 121, 122], [99, 119]]
    assert (ids_in(second.tokens).tolist(), second.num_shared, second.forks) == ([10, 100, 118], 1, ())
    assert len({*first.ids, *second.ids}) == 4


async def test_the_answer_has_the_form_of_the_continuations():
    one = await score(inputs="a", continuations=["b", "c"])
    several = await score(inputs=["a", "a", "a"], continuations=[["b"], ["b", "c"], ["c"]])
    assert several == [one[:1], one, one[1:]]
    assert await score(inputs=[97], continuations=["b"]) == one[:1]


async def test_every_token_of_a_continuation_is_listed_with_its_figures():
    (reply,) = await score(inputs="a", continuations=["bc"], **{"return": ["tokens"]})
    assert [(token["text"], token["rank"]) for token in reply["tokens"]] == [("b", 98 % 3), ("c", 0)]


# lists of tokens


async def test_the_first_token_has_no_score_without_a_prefix():
    tokens = (await score(inputs="aé", **{"return": ["tokens"]}))["tokens"]
    assert tokens[0] == {"id": 97, "text": "a", "logprob": None, "rank": None}
    assert [token["text"] for token in tokens] == ["a", "", "é"]
    assert tokens[1]["rank"] == 0xC3 % 3


@pytest.mark.parametrize(
    ("asked", "extras", "fields"),
    [
        ({"return": ["tokens"]}, Extras(), {}),
        ({"return": ["entropy"]}, Extras(entropy=True), {"entropy": 98 / 64}),
        ({"return": ["memory_share"]}, Extras(memory_share=True), {"memory_share": [98 / 256, 1 - 98 / 256]}),
        (
            {"return": ["top"], "top": 2},
            Extras(num_top=2),
            {"top": [{"id": 98, "text": "b", "logprob": -0.5}, {"id": 99, "text": "c", "logprob": -1.5}]},
        ),
    ],
)
async def test_what_is_asked_of_a_token_and_only_that_is_told(asked, extras, fields):
    link = make_link()
    tokens = (await score(link, inputs="ab", **asked))["tokens"]
    assert link.submitted[0].extras == extras
    assert tokens[0] == {"id": 97, "text": "a", "logprob": None, "rank": None, **dict.fromkeys(fields)}
    assert tokens[1] == {"id": 98, "text": "b", "logprob": fake_logprobs(ids_of("b"))[0], "rank": 2, **fields}


async def test_the_most_probable_five_are_told_if_no_number_is_given():
    tokens = (await score(inputs="ab", **{"return": ["top"]}))["tokens"]
    assert len(tokens[1]["top"]) == 5


@pytest.mark.parametrize("chunk", [1, 2, 1000])
async def test_texts_never_split_a_character_and_join_to_the_whole(chunk):
    text = "é→𝄞 é"
    texts = [
        token["text"]
        for token in (await score(make_link(chunk=chunk), inputs=text, **{"return": ["tokens"]}))["tokens"]
    ]
    assert set(texts) == {"", "é", "→", "𝄞", " "}
    assert "".join(texts) == text
    cut = (await score(make_link(chunk=chunk), inputs=[97, 0xC3], **{"return": ["tokens"]}))["tokens"]
    assert [token["text"] for token in cut] == ["a", "\ufffd"]


# streams


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("returned", [[], ["tokens"], ["top", "entropy", "memory_share"]])
async def test_a_stream_adds_up_to_the_plain_reply(chunk, returned):
    body: dict[str, Any] = {"inputs": "It was ça → dark é", "return": returned}
    plain = await score(make_link(chunk=chunk), **body)
    events = await score(make_link(chunk=chunk), **body, stream=True)
    tokens = [token for event in events for token in event.get("tokens", [])]
    assert tokens == plain.pop("tokens", [])
    assert events[-1]["reply"] == plain
    assert all(event["reply"] is None for event in events[:-1])
    assert len(events) == math.ceil(plain["num_tokens"] / chunk)
    assert all(one["index"] + chunk == other["index"] for one, other in pairwise(events[:-1]))
    assert events[-1]["index"] == events[0]["num_tokens"] == plain["num_tokens"]
    assert "sequence" not in events[0]


async def test_the_replies_of_lists_are_numbered_through():
    body = {"inputs": ["ab", "abc"], "continuations": [["xyz", "u"], ["vw"]]}
    plain = await score(**body)
    events = await score(make_link(chunk=1), **body, stream=True)
    replies = {event["sequence"]: event["reply"] for event in events if event["reply"]}
    assert [replies[i] for i in range(3)] == [*plain[0], *plain[1]]
    assert [event["sequence"] for event in await score(inputs=["ab"], stream=True)] == [0]


async def test_scores_are_sent_before_the_end():
    link = make_link(chunk=1, hang_after=2)
    scoring = start(link, ids_of("abcd"))
    sent: list[str] = []

    async def send(data: bytes) -> None:
        sent.append(data.decode())

    def encode(output: ScoreOutput) -> bytes:
        return encode_event(score_event(output, unit="token", lists_tokens=False, sequence=UNSET))

    run = asyncio.create_task(scoring.run(send, encode=encode))
    await eventually(lambda: [event["index"] for event in read_events("".join(sent))] == [1, 2])
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    assert link.cancelled == [scoring.live.id]


# endings


@pytest.mark.parametrize(
    ("finish_reason", "status", "code"),
    [
        ("timeout", 408, "timeout"),
        ("cancelled", 499, "cancelled"),
        ("shutdown", 503, "draining"),
        ("error", 500, "internal"),
    ],
)
async def test_what_was_not_scored_to_its_end_is_an_error_plain_and_streamed(finish_reason, status, code):
    for stream in (False, True):
        link = make_link(hang_after=0)
        request = asyncio.create_task(post(link, inputs=["ab", "cd"], stream=stream))
        await eventually(lambda link=link: link.num_hanging == 2)
        link.end_all(finish_reason, error="broken" if finish_reason == "error" else "")
        reply = await request
        error = read_events(reply.text)[-1] if stream else reply.json()
        assert reply.status_code == (200 if stream else status)
        assert error["error"]["code"] == code


async def test_a_request_names_its_own_deadline_and_itself():
    link = make_link()
    await score(link, inputs="ab", timeout_s=2.5)
    assert link.submitted[0].timeout_s == 2.5
    assert ScoreRequest(inputs="a").timeout_s is None
    reply = await post(inputs=[300], request_id="mine-1")
    assert (reply.status_code, reply.json()["request_id"]) == (422, "mine-1")


async def test_a_live_request_is_cancelled_by_the_name_it_gave_itself():
    link = make_link(hang_after=0)
    async with make_client(link) as client:
        request = asyncio.create_task(client.post("/score", json={"inputs": ["ab", "cd"], "request_id": "mine-1"}))
        await eventually(lambda: link.num_hanging == 2)
        assert (await client.delete("/requests/mine-1")).json() == {"request_id": "mine-1", "cancelled": 2}
        assert link.cancelled == [name for message in link.submitted for name in message.ids]
        assert (await request).status_code == 499


async def test_a_stream_that_never_began_frees_its_rows():
    link = make_link(hang_after=0)
    scoring = start(link, ids_of("ab"))
    scoring.close()
    scoring.close()
    assert link.cancelled == [scoring.live.id]


# documentation


async def test_every_documented_request_is_answered():
    async with make_client(make_link()) as client:
        described = (await client.get("/openapi.json")).json()["paths"]["/score"]["post"]
        examples = described["requestBody"]["content"]["application/json"]["examples"]
        asked: set[str] = set()
        for example in examples.values():
            asked |= example["value"].keys()
            assert (await client.post("/score", json=example["value"])).status_code == 200
    assert asked == {field.alias or name for name, field in ScoreRequest.model_fields.items()} - {"request_id"}
    assert {"200", "408", "422", "429", "499", "503"} <= described["responses"].keys()

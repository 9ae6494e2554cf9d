"""Functions that the tests of POST /v1/completions over a fake engine share."""

import json
from typing import Any

from tests.support.fake_link import FakeLink
from tests.support.http_harness import make_link, post

PATH = "/v1/completions"


async def complete(link: FakeLink | None = None, **body: Any) -> dict[str, Any]:
    reply = await post(PATH, {"temperature": 0} | body, link=link)
    assert reply.status_code == 200, reply.text
    return reply.json()


def read_chunks(text: str) -> list[dict[str, Any]]:
    *blocks, end = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert end == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


async def stream(link: FakeLink | None = None, **body: Any) -> list[dict[str, Any]]:
    reply = await post(PATH, {"temperature": 0, "stream": True} | body, link=link)
    assert reply.status_code == 200, reply.text
    return read_chunks(reply.text)


def choices_of(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the plain choices that the chunks of a stream add up to."""
    choices: dict[int, dict[str, Any]] = {}
    for part in (choice for chunk in chunks for choice in chunk["choices"]):
        whole = choices.setdefault(part["index"], {"index": part["index"], "text": "", "logprobs": None})
        assert "finish_reason" not in whole or whole["finish_reason"] is None, "nothing comes after the end"
        whole["text"] += part["text"]
        whole["finish_reason"] = part["finish_reason"]
        if part["logprobs"] is not None:
            lists = whole["logprobs"] or {name: [] for name in part["logprobs"]}
            whole["logprobs"] = {name: lists[name] + part["logprobs"][name] for name in lists}
    return [choices[index] for index in sorted(choices)]


async def refusal(body: dict[str, Any], status: int = 422) -> dict[str, Any]:
    link = make_link()
    reply = await post(PATH, body, link=link)
    assert reply.status_code == status, reply.text
    assert not link.submitted
    assert set(reply.json()) == {"error", "error_type", "request_id"}
    return reply.json()["error"]

"""Tests of the page's files without a browser: how they are served, and that they use only what the API has."""

import re
from html.parser import HTMLParser

import httpx
import msgspec
import pytest

from server.dialects.generate.replies import Details, GenerateEvent
from server.dialects.generate.schema import Parameters
from server.dialects.inputs import MAX_TOP
from server.dialects.sampling import FilterFields
from server.dialects.score.replies import ScoreEvent, ScoreReply
from server.dialects.score.schema import ScoreRequest
from server.protocol.messages import Timings
from server.requests.results import OutputToken, ScoredToken, TopToken
from server.web.playground import FOLDER, INDEX, MEDIA_TYPES
from tests.support.http_harness import make_client, make_link

pytestmark = pytest.mark.anyio

FILES = sorted(path.name for path in FOLDER.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]
MAX_BYTES = 60_000
KEY = "correct-horse-battery"


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def address(name: str) -> str:
    return "/" if name == INDEX else f"/playground/{name}"


class Tags(HTMLParser):
    """A parser that collects every tag of a page, with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def values(self, attribute: str) -> list[str]:
        return [value for _, attrs in self.found if (value := attrs.get(attribute)) is not None]


TAGS = Tags(read(INDEX))


async def get(path: str, **options: object) -> httpx.Response:
    headers = {name.replace("_", "-"): str(value) for name, value in options.items()}
    async with make_client(make_link()) as client:
        return await client.get(path, headers=headers)


@pytest.mark.parametrize("name", FILES)
async def test_a_file_is_served_as_what_it_is_and_never_stale(name):
    reply = await get(address(name))
    assert (reply.status_code, reply.text) == (200, read(name))
    assert reply.headers["content-type"] == MEDIA_TYPES[f".{name.rpartition('.')[2]}"]
    assert (reply.headers["cache-control"], reply.headers["x-content-type-options"]) == ("no-cache", "nosniff")
    unchanged = await get(address(name), if_none_match=reply.headers["etag"])
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert unchanged.headers["etag"] == reply.headers["etag"]
    assert (await get(address(name), if_none_match='"another"')).status_code == 200


async def test_the_page_may_load_and_ask_this_server_only():
    policy = (await get("/")).headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert not [tag for tag, attrs in TAGS.found if "style" in attrs or any(name.startswith("on") for name in attrs)]
    assert not re.search(r"<script>|<style", read(INDEX))


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_server(name):
    assert not re.search(r"(https?:)?//[a-z]", read(name).replace("http://www.w3.org/2000/svg", ""))


def test_the_page_loads_what_is_there_by_relative_addresses():
    loaded = TAGS.values("src") + [link for link in TAGS.values("href") if link.startswith("playground/")]
    imported = {name for script in SCRIPTS for name in re.findall(r'from "\./(.*?)"', read(script))}
    assert {link.removeprefix("playground/") for link in loaded} | imported == set(FILES) - {INDEX}
    assert not [link for link in TAGS.values("href") + TAGS.values("src") if link.startswith("/")]


def test_the_page_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MAX_BYTES


@pytest.mark.parametrize("name", SCRIPTS)
def test_text_never_becomes_html(name):
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|Function\(", read(name)
    )


async def test_where_there_are_keys_the_page_is_open_and_nothing_else():
    async with make_client(make_link(), api_keys=[KEY]) as client:
        for path in (*map(address, FILES), "/playground/parameters.json"):
            assert (await client.get(path)).status_code == 200
        for path in ("/info", "/model/spans", "/playground", "/docs"):
            assert (await client.get(path)).status_code == 401
        body = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
        for path in ("/", "/generate", "/score", "/playground/app.js"):
            assert (await client.post(path, json=body)).status_code == 401
        document = (await client.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"})).json()
    assert "401" in document["paths"]["/"]["post"]["responses"]
    assert not [path for path in document["paths"] if "playground" in path]


async def test_posting_to_the_page_still_generates():
    async with make_client(make_link()) as client:
        reply = await client.post("/", json={"inputs": "x", "parameters": {"max_new_tokens": 3}})
    assert reply.json() == {"generated_text": "The"}


async def test_what_is_not_part_of_the_page_is_not_there():
    for path in ("/playground/", "/playground/nothing.js", "/playground/index.html", "/playground/../playground.py"):
        assert (await get(path)).status_code == 404


# The API that the page uses


async def test_the_form_is_made_of_all_numbers_that_shape_one_text():
    described = {one["name"]: one for one in (await get("/playground/parameters.json")).json()}
    assert set(FilterFields.model_fields) == {name for name, one in described.items() if one["asks_for_sampling"]}
    assert {"seed", "max_new_tokens", "repetition_penalty"} <= described.keys() <= Parameters.model_fields.keys()
    assert described["temperature"]["maximum"] == 2
    assert described["top_k"] == {
        "name": "top_k",
        "description": Parameters.model_fields["top_k"].description,
        "type": "integer",
        "default": None,
        "minimum": 0,
        "maximum": 2**31 - 1,
        "asks_for_sampling": True,
    }
    ids = [attrs.get("id") for _, attrs in TAGS.found]
    assert {"parameters", "more-parameters"} <= set(ids)
    assert not described.keys() & set(ids), "no field is written by hand"


def test_what_is_asked_of_score_is_a_valid_request():
    script = read("surprisal.js")
    asked = re.findall(r'"(\w+)"', re.search(r"const RETURN = (\[.*?\]);", script)[1])  # type: ignore[index]
    num_top = int(re.search(r"const NUM_TOP = (\d+);", script)[1])  # type: ignore[index]
    assert num_top <= MAX_TOP
    body = msgspec.json.encode({"inputs": "x", "return": asked, "top": num_top, "stream": True})
    extras = ScoreRequest.model_validate_json(body).extras
    assert (extras.num_top, extras.entropy, extras.memory_share) == (num_top, True, True)


async def test_every_field_that_a_script_reads_is_in_a_reply():
    replies = (GenerateEvent, OutputToken, Details, Timings, ScoreEvent, ScoreReply, ScoredToken, TopToken)
    known = {field.name for reply in replies for field in msgspec.structs.fields(reply)} | set(Parameters.model_fields)
    for path in ("/info", "/model/spans", "/playground/parameters.json"):
        known |= set(re.findall(r'"(\w+)":', (await get(path)).text))
    known |= {"bits_per_byte"}  # a field of info.training.splits, which not every bundle has
    for name in SCRIPTS:
        code = re.sub(r"//.*|/\*\*.*?\*/", "", read(name))
        read_fields = set(re.findall(r"(?<![\w\"])([a-z]+(?:_[a-z]+)+)\b(?!\")", code))  # the page's own names lack _
        strings = {"eos_token", "stop_sequence"}  # finish reasons
        assert read_fields - strings <= known, name

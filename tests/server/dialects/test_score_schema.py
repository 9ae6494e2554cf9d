import json

import pytest

from server.dialects.score.schema import MAX_CONTINUATIONS, ScoreRequest
from server.errors import InvalidField
from server.web.body import parse
from tests.support.http_harness import make_client, make_link


@pytest.mark.parametrize("prefix", [None, "a", 0])
def test_a_prefix_is_a_text_or_an_id_or_nothing(prefix):
    assert parse(json.dumps({"inputs": "a", "prefix": prefix}).encode(), model=ScoreRequest).prefix == prefix


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prefix": ""}, "prefix"),
        ({"prefix": -1}, "prefix"),
        ({"prefix": [1]}, "prefix"),
        ({"return": ["tops"]}, "return.0"),
        ({"return": "tokens"}, "return"),
        ({"return_": ["tokens"]}, "return_"),
        ({"unit": "line"}, "unit"),
        ({"top": 3}, "top"),
        ({"top": 3, "return": ["tokens"]}, "top"),
        ({"top": 0, "return": ["top"]}, "top"),
        ({"top": 21, "return": ["top"]}, "top"),
        ({"top": None, "return": ["top"]}, "top"),
        ({"stream": 1}, "stream"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": "1"}, "timeout_s"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "a" * 129}, "request_id"),
        ({"request_id": "a b"}, "request_id"),
        ({"continuations": "b"}, "continuations"),
        ({"continuations": []}, "continuations"),
        ({"continuations": ["b"] * (MAX_CONTINUATIONS + 1)}, "continuations"),
        ({"continuations": ["b", ""]}, "continuations.1"),
        ({"continuations": ["b", 1]}, "continuations.1"),
        ({"continuations": ["b", ["c"]]}, "continuations.1"),
        ({"continuations": [["b"]]}, "continuations"),
        ({"inputs": ["a"], "continuations": ["b"]}, "continuations"),
        ({"inputs": ["a"], "continuations": [["b"], ["c"]]}, "continuations"),
        ({"inputs": ["a", "a"], "continuations": [["b"], "c"]}, "continuations.1"),
        ({"inputs": ["a", "a"], "continuations": [["b"], []]}, "continuations.1"),
        ({"inputs": ["a", "a"], "continuations": [["b"], ["c", ""]]}, "continuations.1.1"),
    ],
)
def test_a_wrong_field_is_named(body, param):
    with pytest.raises(InvalidField) as caught:
        parse(json.dumps({"inputs": "a", **body}).encode(), model=ScoreRequest)
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"inputs": ""}, "inputs"),
        ({"inputs": "", "continuations": ["a"]}, "inputs"),
        ({"inputs": [[97], [256]], "continuations": [["a"], ["b"]]}, "inputs.1.0"),
        ({"inputs": "a", "prefix": 256}, "prefix"),
        ({"inputs": "a", "continuations": ["b"] * 1000}, "continuations"),  # more continuations than the server holds
    ],
)
@pytest.mark.anyio
async def test_what_only_the_server_can_refuse_is_named_before_the_engine_hears_of_it(body, param):
    link = make_link()
    async with make_client(link) as client:
        reply = await client.post("/score", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, param)
    assert not link.submitted

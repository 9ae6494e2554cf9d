"""Tests over HTTP that the other requests in the batch change no bit of an answer (on the CPU).

They run the model that ships on each backend in float32, and a small model with weights of 8 bits.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.artefacts import BACKENDS, artefact_of, named_backend, shipped_folder
from tests.support.live_server import live_server
from training.corpus import SHAKESPEARE

NUM_ROWS = 8
TEXT = SHAKESPEARE.read_text()
ASKED = {
    "inputs": TEXT[5000:5600],  # several chunks, of which the last is shorter
    "parameters": {
        "temperature": 0.9,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "seed": 7,
        "max_new_tokens": 40,
        "details": True,
        "top_n_tokens": 3,
        "decoder_input_details": True,
    },
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[*BACKENDS, "onnx-int8"])
def client(request) -> Iterator[httpx.Client]:
    served = artefact_of("masked", "onnx-int8") if request.param == "onnx-int8" else shipped_folder(request.param)
    with (
        live_server(served, "--num-rows", str(NUM_ROWS), "--backend", named_backend(request.param)) as url,
        httpx.Client(base_url=url, timeout=300) as client,
    ):
        yield client


def figures(reply: dict[str, Any]) -> dict[str, Any]:
    """Return all fields of a reply that do not depend on the clock."""
    details = {name: value for name, value in reply["details"].items() if name != "timings"}
    return {"generated_text": reply["generated_text"], **details}


def neighbour(client: httpx.Client, number: int) -> int:
    """Send request number `number`; each has another kind and length. Return its HTTP status."""
    if number % 4 == 3:
        body: dict[str, Any] = {"inputs": TEXT[number * 1000 :][: 200 + 900 * number], "return": ["top"]}
        return client.post("/score", json=body).status_code
    parameters = {"max_new_tokens": 10 + 7 * number, "seed": number}
    parameters |= [{"temperature": 1.2}, {"top_k": 5, "frequency_penalty": 0.5}, {}][number % 3]
    body = {"inputs": TEXT[number * 777 :][: 1 + 37 * number], "parameters": parameters}
    return client.post("/generate", json=body).status_code


@pytest.fixture(scope="module")
def alone(client) -> dict[str, Any]:
    assert client.get("/info").json()["engine"]["batch_invariant"]
    return figures(client.post("/generate", json=ASKED).json())


def test_a_request_is_answered_alike_in_a_full_batch(client, alone):
    with ThreadPoolExecutor(20) as pool:
        others = [pool.submit(neighbour, client, number) for number in range(16)]
        same = [pool.submit(client.post, "/generate", json=ASKED) for _ in range(4)]
        answers = [figures(one.result().json()) for one in same]
        assert {one.result() for one in others} == {200}
    assert answers == [alone] * 4


def test_a_request_is_answered_alike_after_others(client, alone):
    assert figures(client.post("/generate", json=ASKED).json()) == alone


def test_a_request_is_answered_alike_when_streamed(client, alone):
    with client.stream("POST", "/generate", json=ASKED | {"stream": True}) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert [event["token"] for event in events] == alone["tokens"]
    assert [event["top_tokens"] for event in events] == alone["top_tokens"]
    assert events[-1]["generated_text"] == alone["generated_text"]
    assert "".join(event["token"]["text"] for event in events) == alone["generated_text"]


def test_each_fork_is_what_its_seed_gives_alone(client, alone):
    parameters = ASKED["parameters"] | {"n": 3}
    forks = client.post("/generate", json=ASKED | {"parameters": parameters}).json()
    assert figures(forks[0]) == alone
    for fork in forks[1:]:
        single = ASKED | {"parameters": ASKED["parameters"] | {"seed": fork["details"]["seed"]}}
        assert figures(client.post("/generate", json=single).json()) == figures(fork)


def test_a_document_is_scored_alike_among_others(client):
    asked = {"inputs": TEXT[20000:26000], "return": ["tokens"]}
    alone = client.post("/score", json=asked).content
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(neighbour, client, number) for number in range(8)]
        assert pool.submit(client.post, "/score", json=asked).result().content == alone
        assert {one.result() for one in others} == {200}

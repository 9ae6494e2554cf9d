"""All paths agree on small bundles: each returns the oracle's logits, the same text, or the same scores.

oracle = training forward = any block split = in chunks = token by token = ragged batch = runner and engine = /score
= training.evaluate. All paths except the training forward run on every backend: the baked model in torch, TorchScript
and ONNX.
"""

import asyncio
import json

import httpx
import numpy as np
import pytest
import torch

from model.bundle import Bundle
from model.frozen.baked import bake
from model.frozen.served import ServedLM, score_document
from model.network.network import AllAttentionLM
from model.sampling.params import SamplingParams
from model.scoring import TextFigures
from server.app import create_app
from server.config import EngineOptions, Settings
from server.engine.engine import Engine
from server.engine.runner import ModelRunner
from server.link.supervisor import EngineLink
from server.protocol.messages import Generate
from server.protocol.messages import Score as ScoreRequest
from server.served_model import open_model
from tests import oracle
from tests.support.agreement_bundle import KINDS, build_network, text_of, text_tokens
from tests.support.artefacts import EACH_BACKEND, named_backend, served_folder, served_model
from training.evaluate import evaluate

LENGTH = 230  # beyond the longest ring of 160, in which every slot has been overwritten
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def network(kind) -> AllAttentionLM:
    return build_network(kind)


@pytest.fixture(scope="module", params=EACH_BACKEND)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind, backend) -> ServedLM:
    return served_model(kind, backend)


@pytest.fixture(scope="module")
def text(kind) -> np.ndarray:
    return text_tokens(LENGTH, kind)


@pytest.fixture(scope="module")
def wanted(network, text) -> torch.Tensor:
    """The oracle's logits, [T, V]."""
    config = network.config
    weights = {name: tensor.double().numpy() for name, tensor in network.state_dict().items()}
    logits = oracle.logits(
        weights,
        text.tolist(),
        num_heads=config.num_heads,
        max_span=config.max_span,
        span_ramp=config.span_ramp,
        empty_slots=config.empty_slots,
    )
    return torch.from_numpy(logits).float()


def check(logits: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (logits - wanted).abs().max() <= TOLERANCE
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))


def training_logits(network, text, sizes):
    cache = network.init_cache(1)
    parts = []
    with torch.no_grad():
        for block in torch.split(torch.from_numpy(text)[None], sizes, 1):
            hidden, cache = network(block, cache)
            parts.append(network.logits(hidden)[0])
    return torch.cat(parts)


def in_chunks(model, text, size):
    cache = model.allocate(1)
    parts = []
    for chunk in torch.from_numpy(text).split(size):
        hidden, new = model.extend(chunk[None], cache, [0])
        cache.commit([0], new, [len(chunk)])
        parts.append(model.logits(hidden[0]))
    return torch.cat(parts)


def token_by_token(model, text):
    cache = model.allocate(1)
    parts = []
    for token in torch.from_numpy(text):
        logits, new = model.decode(token[None], cache)
        cache.commit([0], new, [1])
        parts.append(logits)
    return torch.cat(parts)


def ragged(model, text):
    """Five rows at different places of the text, moving at random in both kinds of step, some resting, one moved."""
    random = np.random.default_rng(4)
    cache = model.allocate(6)
    seen: list[list[torch.Tensor]] = [[] for _ in range(5)]
    row_of = list(range(5))
    while min(map(len, seen)) < LENGTH:
        if random.random() < 0.05:  # a row changes places with the spare one
            stream = int(random.integers(5))
            spare = next(row for row in range(6) if row not in row_of)
            cache.move(row_of[stream], spare)
            row_of[stream] = spare
        streams = [int(s) for s in random.permutation(5)[: random.integers(1, 6)] if len(seen[s]) < LENGTH]
        if not streams:
            continue
        if random.random() < 0.6:
            decode_some(model, cache, text, seen, streams, row_of)
        else:
            counts = [int(min(random.integers(1, 50), LENGTH - len(seen[s]))) for s in streams]
            tokens = np.zeros((len(streams), max(counts)), dtype=np.int64)
            for line, stream, count in zip(tokens, streams, counts, strict=True):
                line[:count] = text[len(seen[stream]) :][:count]
            rows = [row_of[stream] for stream in streams]
            hidden, new = model.extend(torch.from_numpy(tokens), cache, rows)
            cache.commit(rows, new, counts)
            for line, stream, count in zip(hidden, streams, counts, strict=True):
                seen[stream] += list(model.logits(line[:count]))
    return [torch.stack(logits) for logits in seen]


def decode_some(model, cache, text, seen, streams, row_of):
    width = max(row_of[stream] for stream in streams) + 1
    tokens, num_new = np.zeros(width, dtype=np.int64), np.zeros(width, dtype=np.int64)
    for stream in streams:
        tokens[row_of[stream]] = text[len(seen[stream])]
        num_new[row_of[stream]] = 1
    logits, new = model.decode(torch.from_numpy(tokens), cache)
    cache.commit(range(width), new, num_new.tolist())
    for stream in streams:
        seen[stream].append(logits[row_of[stream]])


def test_the_bundle_has_rings_of_several_sizes_in_one_layer(network):
    groups = [layer.groups for layer in bake(network).layers]
    assert len(groups[0]) > 1
    assert len({group.num_slots for layer in groups for group in layer}) > 2


@pytest.mark.parametrize("sizes", [[LENGTH], [64] * 3 + [38], [1] * LENGTH, [199, 31]], ids=str)
def test_training_forward_in_any_block_split(network, text, wanted, sizes):
    check(training_logits(network, text, sizes), wanted)


@pytest.mark.parametrize("size", [LENGTH, 128, 37, 1])
def test_in_chunks(model, text, wanted, size):
    check(in_chunks(model, text, size), wanted)


def test_token_by_token(model, text, wanted):
    check(token_by_token(model, text), wanted)


def test_ragged_batch_of_both_kinds_of_step(model, text, wanted):
    for logits in ragged(model, text):
        check(logits, wanted)


def greedy_text(wanted_of, prompt, length):
    """The greedy continuation of `prompt` by a function from tokens to logits."""
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(int(wanted_of(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def engine_of(model: ServedLM, options: EngineOptions) -> Engine:
    return Engine(ModelRunner(model, options), options)


def test_engine_generates_the_training_forward_s_greedy_tokens(network, model, text):
    def logits(tokens):
        with torch.no_grad():
            return network.logits(network(torch.tensor([tokens]), network.init_cache(1))[0])[0]

    engine = engine_of(model, EngineOptions(num_rows=3, chunk_tokens=16, budget_tokens=32))
    prompts = {str(n): text[:n].tolist() for n in (1, 7, 40, 100, 200)}
    greedy = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
    for name, prompt in prompts.items():
        engine.submit(Generate(name, np.array(prompt, "<i4").tobytes(), greedy, 12))
    found: dict[str, list[int]] = {name: [] for name in prompts}
    while engine.has_work:
        for token in engine.step().tokens:
            found[token.sequence].append(token.token)
    assert found == {name: greedy_text(logits, prompt, 12) for name, prompt in prompts.items()}


def test_engine_and_document_scores(model, text, wanted):
    expected = wanted.log_softmax(-1)[:-1].gather(-1, torch.from_numpy(text[1:, None]))[:, 0].numpy()
    document = np.concatenate([logprobs for logprobs, _ in score_document(model, text, chunk_tokens=50)])
    assert np.abs(document - expected).max() <= TOLERANCE
    engine = engine_of(model, EngineOptions(num_rows=2, chunk_tokens=33, budget_tokens=40))
    engine.submit(ScoreRequest("a", text.astype("<i4").tobytes()))
    scores = []
    while engine.has_work:
        scores += [np.frombuffer(part.logprobs, "<f4") for part in engine.step().scores]
    assert np.abs(np.concatenate(scores) - expected).max() <= TOLERANCE


@pytest.mark.slow
def test_score_over_http_equals_evaluate_and_the_oracle(kind, backend, network, model, text):
    bundle, settings = open_model(
        Settings(bundle=served_folder(kind, backend), backend=named_backend(backend), num_rows=2, num_threads=1)
    )
    whole = np.array(bundle.tokenizer.encode(text_of(kind)))
    evaluated = evaluate(model, bundle.tokenizer, whole).score
    texts = [text_of(kind), bundle.tokenizer.decode(text.tolist())]
    reply, part = asyncio.run(post_score(settings, bundle, texts))
    assert reply["num_tokens"] == evaluated.num_tokens == len(whole) - 1
    for figure in ("logprob", "perplexity", "word_perplexity", "bits_per_token", "bits_per_byte", "bits_per_char"):
        assert reply[figure] == pytest.approx(getattr(evaluated, figure), rel=1e-6), figure
    logits = training_logits(network, text, [LENGTH])
    logprobs = logits.log_softmax(-1)[:-1].gather(-1, torch.from_numpy(text[1:, None]))[:, 0]
    by_training = TextFigures.of(bundle.tokenizer, text[1:].tolist(), logprobs.tolist())
    assert part["bits_per_byte"] == pytest.approx(by_training.bits_per_byte, rel=1e-5)


async def post_score(settings: Settings, bundle: Bundle, texts: list[str]) -> list[dict]:
    """The replies of a real engine process behind the real HTTP side."""
    link = EngineLink(settings)
    await link.start()
    try:
        transport = httpx.ASGITransport(create_app(settings=settings, bundle=bundle, link=link))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            response = await client.post("/score", content=json.dumps({"inputs": texts}))
            assert response.status_code == 200, response.text
            return response.json()
    finally:
        await link.close(grace_s=0)

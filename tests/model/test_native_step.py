"""Tests of the native step: the oracle's logits, torch's draws, the promises to the cache's owner, and refusals."""

import numpy as np
import pytest
import torch

from model.backends import LoadOptions
from model.bundle import open_bundle
from model.config import ModelConfig
from model.frozen.baked import bake, load_baked
from model.frozen.native.build import NativeError
from model.frozen.native.library import DRAW, runnable_variants
from model.frozen.native.lm import NativeLM, load_native
from model.frozen.served import score_document
from model.sampling.draw import Draws, draw, score_targets
from model.sampling.params import SamplingParams
from model.scoring import TextFigures
from server.config import EngineOptions
from server.engine.engine import Engine
from server.engine.runner import ModelRunner
from server.protocol.messages import Generate
from tests import oracle
from tests.support.agreement_bundle import KINDS, build_network, text_tokens
from tests.support.artefacts import SHIPPED
from tests.support.native_models import native, random_tokens, small_native, tiled_network
from training.corpus import SHAKESPEARE

LENGTH = 230  # longer than the longest ring (160 slots), so that every slot has been overwritten
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind) -> NativeLM:
    return small_native(kind)


@pytest.fixture(scope="module")
def text(kind) -> torch.Tensor:
    return torch.from_numpy(text_tokens(LENGTH, kind))


@pytest.fixture(scope="module")
def wanted(kind, text) -> torch.Tensor:
    """Return the oracle's logits, [T, V]."""
    network = build_network(kind)
    config = network.config
    logits = oracle.logits(
        {name: tensor.double().numpy() for name, tensor in network.state_dict().items()},
        text.tolist(),
        num_heads=config.num_heads,
        max_span=config.max_span,
        span_ramp=config.span_ramp,
        empty_slots=config.empty_slots,
    )
    return torch.from_numpy(logits).float()


def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= TOLERANCE
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("size", [LENGTH, 100, 37])
def test_chunks_give_the_oracle_s_logits(model, text, wanted, size):
    cache, parts = model.allocate(1), []
    for chunk in torch.split(text, size):
        hidden, new = model.extend(chunk[None], cache, [0])
        cache.commit([0], new, [len(chunk)])
        parts.append(model.logits(hidden[0]))
    check(torch.cat(parts), wanted)


def test_token_by_token_gives_the_oracle_s_logits(model, text, wanted):
    cache, parts = model.allocate(1), []
    for token in text:
        logits, new = model.decode(token[None], cache)
        cache.commit([0], new, [1])
        parts.append(logits)
    check(torch.cat(parts), wanted)


def test_both_kinds_of_step_in_turn_give_the_oracle_s_logits(model, text, wanted):
    """Three rows at different positions of the text, which change places with a fourth row."""
    random, cache, rows = np.random.default_rng(4), model.allocate(4), [2, 0, 1]
    seen: list[list[torch.Tensor]] = [[], [], []]
    while min(map(len, seen)) < LENGTH:
        one = int(random.integers(3))
        count = min(int(random.choice([1, 1, 1, 2, 30])), LENGTH - len(seen[one]))
        if count == 0:
            continue
        spare = next(row for row in range(4) if row not in rows)
        cache.move(rows[one], spare)
        rows[one] = spare
        tokens = text[len(seen[one]) :][:count]
        if count == 1:
            fed = torch.zeros(4, dtype=torch.int64)
            fed[spare] = tokens[0]
            logits, new = model.decode(fed, cache)
            cache.commit(range(4), new, [int(row == spare) for row in range(4)])
            seen[one].append(logits[spare])
        else:
            hidden, new = model.extend(tokens[None], cache, [spare])
            cache.commit([spare], new, [count])
            seen[one] += list(model.logits(hidden[0]))
    for logits in seen:
        check(torch.stack(logits), wanted)


def test_the_shares_of_persistent_vectors_are_torch_s(kind, model, text):
    torch_model = bake(build_network(kind))
    expected = torch_model.extend_with_memory_share(text[None], torch_model.allocate(1), [0])
    found = model.extend_with_memory_share(text[None], model.allocate(1), [0])
    assert (found[2] - expected[2]).abs().max() < 1e-5
    assert (found[0] - expected[0]).abs().max() < TOLERANCE
    for own, other in zip(found[1], expected[1], strict=True):
        assert own.shape == other.shape


def test_it_describes_itself_as_torch_does(kind, model):
    torch_model = bake(build_network(kind))
    assert model.spans == torch_model.spans
    assert (model.backend, model.weights, model.dtype) == ("native", "float32", torch.float32)
    assert model.invariant_rows == 1
    cache = model.allocate(3)
    assert cache.snapshot(1).num_bytes == cache.bytes_per_row == model.row_bytes


def test_the_engine_generates_torch_s_greedy_tokens(kind, model, text):
    found = []
    for one in (model, bake(build_network(kind))):
        options = EngineOptions(num_rows=3, chunk_tokens=16, budget_tokens=32)
        engine = Engine(ModelRunner(one, options), options)
        greedy = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
        for length in (1, 7, 40, 100, 200):
            engine.submit(Generate(str(length), text[:length].numpy().astype("<i4").tobytes(), greedy, 12))
        tokens: dict[str, list[int]] = {}
        while engine.has_work:
            for token in engine.step().tokens:
                tokens.setdefault(token.sequence, []).append(token.token)
        found.append(tokens)
    assert found[0] == found[1]


def test_documents_are_scored_as_torch_scores_them(kind, model, text):
    documents = [
        np.concatenate([logprobs for logprobs, _ in score_document(one, text.numpy(), chunk_tokens=50)])
        for one in (model, bake(build_network(kind)))
    ]
    assert np.abs(documents[0] - documents[1]).max() < TOLERANCE


def test_given_tokens_are_scored_as_torch_scores_the_same_logits(model, text):
    hidden, _ = model.extend(text[None], model.allocate(1), [0])
    expected = score_targets(model.logits(hidden[0, :-1]), text[1:])
    logprobs, ranks = model.score(hidden[0, :-1], text[1:])
    assert torch.equal(ranks, expected.ranks)
    assert (logprobs - expected.logprobs).abs().max() < 1e-5
    with pytest.raises(NativeError, match="token 999 is not in the vocabulary"):
        model.score(hidden[0, :2], torch.tensor([0, 999]))


def test_a_step_changes_nothing_until_its_commit(model, text):
    cache = model.allocate(2)
    _, new = model.extend(text[None, :90], cache, [1])
    cache.commit([1], new, [90])
    before = cache.rings.clone()
    model.decode(text[:2], cache)
    model.extend(text[None, :50], cache, [1])
    assert torch.equal(cache.rings, before)
    assert cache.lengths.tolist() == [0, 90]


def test_a_wrong_token_is_named_and_changes_nothing(model, text):
    size = model.config.vocab_size
    cache = model.allocate(2)
    message = f"token {size} is not in the vocabulary; allowed: 0 .. {size - 1}"
    with pytest.raises(NativeError, match=message):
        model.decode(torch.tensor([0, size]), cache)
    with pytest.raises(NativeError, match=message):
        model.extend(torch.tensor([[0, size, 1]]), cache, [0])
    with pytest.raises(NativeError, match="token -1 is not"):
        model.decode_and_draw(np.array([-1, 0]), cache, rows=np.arange(2), draws=np.zeros(2, DRAW))
    assert cache.lengths.tolist() == [0, 0]
    assert not cache.rings.any()


def test_an_unknown_choice_is_named_with_those_allowed():
    network = tiled_network()
    with pytest.raises(NativeError, match=r"weights 'int3' is unknown .* allowed: float32, bfloat16, int8, int4"):
        native(network, weights="int3")
    with pytest.raises(NativeError, match=r"rings 'int4' is unknown .* allowed: float32, bfloat16"):
        native(network, rings="int4")
    with pytest.raises(NativeError, match=r"variant 'sse' cannot run here; allowed: auto, generic"):
        native(network, variant="sse")
    with pytest.raises(NativeError, match=r"num_threads 1000 .* 1 .. 256"):
        native(network, num_threads=1000)


def test_a_width_that_it_does_not_support_is_named():
    config = ModelConfig(vocab_size=9, num_layers=1, width=24, num_heads=2, num_persistent=3, max_span=8)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in config.tensor_shapes().items()}
    with pytest.raises(NativeError, match="width 24 is not supported by the native step; allowed: multiples of 16"):
        NativeLM(config, tensors)


@pytest.mark.parametrize("variant", runnable_variants())
def test_a_variant_can_be_forced(variant):
    assert native(tiled_network(), variant=variant).variant == variant


def samplings(count: int) -> list[SamplingParams]:
    random = np.random.default_rng(3)
    warm = [float(one) for one in random.choice([0.0, 0.3, 1.0, 2.5], size=count)]
    seeds = random.integers(2**62, size=count).tolist()
    return [SamplingParams(temperature=one, seed=seed) for one, seed in zip(warm, seeds, strict=True)]


@pytest.mark.parametrize("network", ["words", "tiled"])
def test_draws_are_those_of_model_sampling_for_the_same_logits(network):
    """Probabilities may differ in the last bit; a draw in 10,000 may differ because its noise falls on an edge."""
    model = small_native("words") if network == "words" else native(tiled_network())
    cache, count, random = model.allocate(24), 24, np.random.default_rng(1)
    wishes = samplings(count)
    draws = np.zeros(count, DRAW)
    draws["temperature"], draws["seed"] = [one.temperature for one in wishes], [one.seed for one in wishes]
    prepared, alike, last = Draws(wishes), 0, random.integers(model.config.vocab_size, size=count)
    for step in range(60):
        draws["position"] = step + 1
        tokens, logprobs, logits, _ = model.decode_and_draw(last, cache, rows=np.arange(count), draws=draws)
        expected = draw(logits, prepared, positions=[step + 1] * count, num_generated=[step] * count)
        alike += int((torch.from_numpy(tokens) == expected.tokens).sum())
        own = logits.log_softmax(-1).gather(-1, torch.from_numpy(tokens)[:, None])[:, 0]
        assert np.abs(logprobs - own.numpy()).max() < 1e-5
        last = tokens
    assert alike >= 60 * count - 1
    assert len(set(last.tolist())) > 3


def test_a_greedy_draw_takes_the_first_of_equals():
    network = tiled_network()
    with torch.no_grad():
        output = network.output.weight.clone()
        network.output.weight.zero_()
        network.output.bias.zero_()[[7, 9]] = 1.0
    try:
        model = native(network)
    finally:
        with torch.no_grad():
            network.output.weight.copy_(output)
            network.output.bias.zero_()
    tokens, logprobs, logits, _ = model.decode_and_draw(
        np.array([3]), model.allocate(1), rows=np.array([0]), draws=np.zeros(1, DRAW)
    )
    assert tokens.tolist() == [7]
    assert logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[0, 7]), abs=1e-6)


def test_logits_that_are_not_finite_give_no_number():
    network = build_network("masked")
    with torch.no_grad():
        network.output.bias[5] = float("nan")
    model = native(network)
    draws = np.zeros(2, DRAW)
    draws["temperature"][1] = 1.0
    tokens, logprobs, _, _ = model.decode_and_draw(np.array([3, 4]), model.allocate(2), rows=np.arange(2), draws=draws)
    assert np.isnan(logprobs).all()
    assert ((tokens >= 0) & (tokens < 256)).all()


def test_draws_follow_the_distribution():
    model = native(tiled_network())
    cache = model.allocate(1)
    draws = np.zeros(1, DRAW)
    draws["temperature"] = 1.5
    kept, counts = cache.snapshot(0), np.zeros(model.config.vocab_size)
    for seed in range(4000):
        cache.restore(0, kept)
        draws["seed"] = seed
        tokens, _, logits, _ = model.decode_and_draw(np.array([3]), cache, rows=np.array([0]), draws=draws)
        counts[tokens[0]] += 1
    expected = (logits[0] / 1.5).softmax(-1).double().numpy() * 4000
    often = expected > 5
    assert often.sum() > 20
    deviation = ((counts - expected) ** 2 / expected)[often].sum()  # chi-squared
    assert deviation < often.sum() + 5 * np.sqrt(2 * often.sum())


@pytest.mark.parametrize(("weights", "bound"), [("bfloat16", 0.02), ("int8", 0.06), ("int4", 0.6)])
def test_rounded_weights_change_little(weights, bound):
    """Checks the mean difference of logits, which vary by about 3."""
    text = random_tokens(120)
    exact, rounded = native(tiled_network()), native(tiled_network(), weights=weights)
    logits = [one.logits(one.extend(text[None], one.allocate(1), [0])[0][0]) for one in (exact, rounded)]
    assert logits[0].std() > 2
    assert 1e-4 < (logits[0] - logits[1]).abs().mean() < bound
    assert exact.weight_bytes > 1.5 * rounded.weight_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "bound"), [("float32", 1e-5), ("bfloat16", 0.001), ("int8", 0.003), ("int4", 0.015)]
)
def test_rounded_weights_cost_few_bits_on_a_real_text(weights, bound):
    """Compares bits per byte, on a text that the shipped model was not trained on, with torch's in float32."""
    bundle = open_bundle(SHIPPED)
    tokens = np.array(bundle.tokenizer.encode(SHAKESPEARE.read_text()[:30_000]))
    found = []
    for model in (
        load_baked(bundle),
        load_native(
            bundle, LoadOptions(weights=weights, dtype="float32" if weights == "float32" else "bfloat16", num_threads=2)
        ),
    ):
        logprobs = np.concatenate([some for some, _ in score_document(model, tokens)]).tolist()
        found.append(TextFigures.of(bundle.tokenizer, tokens[1:].tolist(), logprobs).bits_per_byte)
    assert found[1] - found[0] < bound

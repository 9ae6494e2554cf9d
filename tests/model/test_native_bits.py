"""Tests that the order of every sum depends on the model alone: equal bits of logits and rings, however computed.

A row's numbers depend on its own tokens alone. They do not depend on the other rows of the batch, the chunks in which
the text is read, the number of threads, the instruction set, or the slot at which a ring begins.
"""

from functools import cache

import numpy as np
import pytest
import torch

from model.frozen.native.folding import ring_slots
from model.frozen.native.library import DRAW, WEIGHTS, runnable_variants
from model.frozen.native.lm import NativeLM
from tests.support.native_models import native, random_tokens, tiled_network

pytestmark = pytest.mark.slow

LENGTH = 150  # longer than every ring (16 to 96 slots)
TOKENS = random_tokens(LENGTH)


@pytest.fixture(scope="module", params=WEIGHTS)
def weights(request) -> str:
    return request.param


@cache
def model_of(weights: str, variant: str = "auto", threads: int = 2) -> NativeLM:
    return native(tiled_network(), weights=weights, variant=variant, num_threads=threads)


@cache
def wanted_of(weights: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [T, V] and the row's rings, computed token by token in a batch of one, on one thread."""
    return token_by_token(model_of(weights, threads=1))


@pytest.fixture
def wanted(weights) -> tuple[torch.Tensor, torch.Tensor]:
    return wanted_of(weights)


def token_by_token(model: NativeLM) -> tuple[torch.Tensor, torch.Tensor]:
    cache, parts = model.allocate(1), []
    for token in TOKENS:
        logits, new = model.decode(token[None], cache)
        cache.commit([0], new, [1])
        parts.append(logits)
    return torch.cat(parts), cache.rings[0]


def in_chunks(model: NativeLM, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    cache, parts = model.allocate(1), []
    for chunk in torch.split(TOKENS, sizes):
        hidden, new = model.extend(chunk[None], cache, [0])
        cache.commit([0], new, [len(chunk)])
        parts.append(model.logits(hidden[0]))
    return torch.cat(parts), cache.rings[0]


def assert_same(found, wanted) -> None:
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_different_tokens_give_different_bits(weights, wanted):
    """If different tokens gave equal bits, the other tests would prove nothing."""
    assert len({tuple(line.tolist()) for line in wanted[0]}) == LENGTH


@pytest.mark.parametrize("sizes", [[150], [1, 149], [32, 33, 85], [7] * 21 + [3], [16] * 9 + [6]], ids=str)
def test_a_text_is_read_alike_in_any_chunks(weights, wanted, sizes):
    assert_same(in_chunks(model_of(weights), sizes), wanted)


@pytest.mark.parametrize("variant", runnable_variants())
def test_every_variant_reads_alike(weights, wanted, variant):
    assert_same(in_chunks(model_of(weights, variant), [1, 2, 5, 142]), wanted)


@pytest.mark.parametrize("variant", runnable_variants())
def test_every_variant_decodes_alike(weights, wanted, variant):
    assert_same(token_by_token(model_of(weights, variant)), wanted)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_computes_alike(weights, wanted, threads):
    model = model_of(weights, threads=threads)
    assert_same(in_chunks(model, [70, 80]), wanted)
    assert_same(token_by_token(model), wanted)


@pytest.mark.parametrize("variant", runnable_variants())
@pytest.mark.parametrize("num_rows", [2, 5, 12, 37])
def test_a_row_is_decoded_alike_in_any_batch(weights, wanted, num_rows, variant):
    """The other rows are at other positions of other texts, and the text moves from row to row."""
    model = model_of(weights, variant)
    cache = model.allocate(num_rows)
    for row in range(num_rows):
        _, new = model.extend(random_tokens(1 + 3 * row, seed=row + 1)[None], cache, [row])
        cache.commit([row], new, [1 + 3 * row])
    own = num_rows // 2
    cache.reset(own)
    for i, token in enumerate(TOKENS[:110]):
        if i % 40 == 39:  # the text moves to another row
            cache.move(own, (own + 1) % num_rows)
            own = (own + 1) % num_rows
        fed = random_tokens(num_rows, seed=1000 + i)
        fed[own] = token
        logits, new = model.decode(fed, cache)
        assert torch.equal(logits[own], wanted[0][i]), i
        cache.commit(range(num_rows), new, [1] * num_rows)


def test_a_row_goes_on_alike_from_a_snapshot(weights, wanted):
    model = model_of(weights)
    cache, other = model.allocate(2), model.allocate(3)
    _, new = model.extend(TOKENS[None, :101], cache, [1])
    cache.commit([1], new, [101])
    kept = cache.snapshot(1)
    cache.reset(1)
    other.restore(2, kept)
    for i, token in enumerate(TOKENS[101:], 101):
        logits, new = model.decode(torch.stack((token * 0, token * 0 + 1, token)), other)
        other.commit(range(3), new, [1, 1, 1])
        assert torch.equal(logits[2], wanted[0][i])


def test_padding_leaves_no_trace(weights, wanted):
    model = model_of(weights)
    cache = model.allocate(2)
    lines = torch.stack((torch.cat((TOKENS[:60], TOKENS[:20])), random_tokens(80, seed=3)))
    hidden, new = model.extend(lines, cache, [0, 1])
    cache.commit([0, 1], new, [60, 80])
    assert torch.equal(model.logits(hidden[0, :60]), wanted[0][:60])
    hidden, new = model.extend(TOKENS[None, 60:], cache, [0])
    cache.commit([0], new, [LENGTH - 60])
    assert torch.equal(model.logits(hidden[0]), wanted[0][60:])
    assert torch.equal(cache.rings[0], wanted[1])


@pytest.mark.parametrize("weights", ["float32"])
@pytest.mark.parametrize("offset", [1, 15, 16, 40, 95])
def test_it_does_not_matter_where_rings_begin(weights, offset):
    """The second row's rings are full and turned by `offset` slots, and the row is that many tokens older."""
    model = model_of(weights)
    cache = model.allocate(2)
    _, new = model.extend(TOKENS[None, :120], cache, [0])
    cache.commit([0], new, [120])
    cache.rings[1] = turned(model, cache.rings[0].view(torch.float32), offset).view(torch.uint8)
    cache.lengths[1] = 120 + offset
    for i in range(120, 140):
        logits, new = model.decode(TOKENS[i].expand(2), cache)
        cache.commit([0, 1], new, [1, 1])
        assert torch.equal(logits[0], logits[1])
    hidden, _ = model.extend(TOKENS[140:].expand(2, -1), cache, [0, 1])
    assert torch.equal(hidden[0], hidden[1])


def turned(model: NativeLM, rings: torch.Tensor, by: int) -> torch.Tensor:
    """Return a row's float32 rings, keys [S/16, D, 16] then values [S, D] of each head, with slot s moved to s + by."""
    parts, head = [], model.config.head_size
    for num_slots in ring_slots(model.spans).flatten().tolist():
        keys, values, rings = rings.split([num_slots * head, num_slots * head, len(rings) - 2 * num_slots * head])
        by_slot = keys.view(-1, head, 16).mT.reshape(num_slots, head).roll(by, 0)
        parts += [by_slot.view(-1, 16, head).mT.flatten(), values.view(num_slots, head).roll(by, 0).flatten()]
    return torch.cat([*parts, rings])


@pytest.mark.parametrize("empty_slots", ["masked", "zero"])
def test_a_fused_draw_leaves_what_decode_and_commit_leave(weights, empty_slots):
    model = native(tiled_network(empty_slots), weights=weights)
    apart, fused = model.allocate(3), model.allocate(3)
    rows = np.array([2, 0])
    for i, token in enumerate(TOKENS[:100].tolist()):
        fed = torch.tensor([token, 0, (token * 7 + i) % 300])
        expected, new = model.decode(fed, apart)
        apart.commit(range(3), new, [1, 0, 1])
        _, _, logits, _ = model.decode_and_draw(fed.numpy()[rows], fused, rows=rows, draws=np.zeros(2, DRAW))
        assert torch.equal(logits, expected[rows])
    assert torch.equal(apart.rings[[0, 2]], fused.rings[[0, 2]])
    assert apart.lengths.tolist() == fused.lengths.tolist()

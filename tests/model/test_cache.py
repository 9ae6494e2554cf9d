"""Snapshots of a row, on every backend: a restored row continues bit for bit like the original."""

import pytest
import torch

from model.frozen.cache import RingCache
from model.frozen.served import ServedLM
from tests.support.agreement_bundle import text_tokens
from tests.support.artefacts import EACH_BACKEND, served_model

LENGTHS = (0, 1, 40, 200)  # fresh, hardly begun, between two ring sizes, and beyond the longest ring of 160


@pytest.fixture(scope="module", params=EACH_BACKEND)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=("masked", "zero"))
def model(request, backend) -> ServedLM:
    return served_model(request.param, backend)


def filled(model: ServedLM, length: int, *, row: int) -> RingCache:
    """A cache of four rows; one row has read the first tokens of the text, the other rows other tokens."""
    cache = model.allocate(4)
    for other in range(4):
        tokens = text_tokens(length if other == row else 30 + other)
        if len(tokens):
            stretch = torch.from_numpy(tokens if other == row else tokens[::-1].copy())[None]
            _, new = model.extend(stretch, cache, [other])
            cache.commit([other], new, [len(tokens)])
    return cache


def go_on(model: ServedLM, cache: RingCache, row: int) -> list[torch.Tensor]:
    """The outputs of one row for some more tokens, in both kinds of step."""
    found = []
    for tokens in text_tokens(80).reshape(2, 40):
        hidden, new = model.extend(torch.from_numpy(tokens)[None], cache, [row])
        cache.commit([row], new, [len(tokens)])
        found.append(hidden[0])
    for token in (5, 6, 7):
        fed = torch.full((4,), token)
        logits, new = model.decode(fed, cache)
        cache.commit(range(4), new, [int(other == row) for other in range(4)])
        found.append(logits[row])
    return found


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_row_restored_after_other_work_goes_on_as_it_would_have(model, length):
    cache = filled(model, length, row=1)
    kept = cache.snapshot(1)
    expected = go_on(model, cache, 1)
    assert_same(go_on(model, reset_to(cache, 1, kept), 1), expected)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_snapshot_goes_on_in_another_row_of_another_cache(model, length):
    cache = filled(model, length, row=1)
    kept = cache.snapshot(1)
    expected = go_on(model, cache, 1)
    other = filled(model, 77, row=3)
    assert_same(go_on(model, reset_to(other, 2, kept), 2), expected)


def test_many_rows_may_fork_off_one_snapshot(model):
    cache = filled(model, 100, row=0)
    kept = cache.snapshot(0)
    for row in (1, 2, 3):
        cache.restore(row, kept)
    expected = go_on(model, cache, 0)
    for row in (1, 2, 3):
        assert_same(go_on(model, cache, row), expected)


def test_restoring_leaves_the_other_rows_alone(model):
    cache = filled(model, 100, row=0)
    before = [cache.snapshot(row) for row in range(4)]
    cache.restore(2, before[0])
    for row, source in enumerate((0, 1, 0, 3)):
        now = cache.snapshot(row)
        assert now.length == before[source].length
        assert_same(now.rings, before[source].rings)


def test_a_snapshot_costs_what_a_row_costs(model):
    cache = model.allocate(3)
    assert cache.snapshot(1).num_bytes == cache.bytes_per_row


def reset_to(cache: RingCache, row: int, snapshot) -> RingCache:
    """The cache after a reset of a row and a restore of another state into it."""
    cache.reset(row)
    cache.restore(row, snapshot)
    return cache

"""Streams: which tokens they read, in which order, when they forget the past, and that a resumed run reads the same."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.config import ConfigError
from training.data import Batch, Streams

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 60))  # streams, block, tokens above the minimum


def make(streams: int, block: int, more: int, *, seed: int = 0, reset_prob: float = 0.0) -> Streams:
    """Streams over the tokens 0, 1, 2, ..., so that a token equals its position."""
    tokens = np.arange(streams * 2 * block + more)
    return Streams(tokens, num_streams=streams, block=block, seed=seed, reset_prob=reset_prob)


def same(one: Batch, other: Batch) -> bool:
    pairs = ((one.inputs, other.inputs), (one.targets, other.targets), (one.reset, other.reset))
    return all(torch.equal(left, right) for left, right in pairs)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@given(SIZES)
def test_the_first_epoch_reads_every_token_of_a_stretch_once_up_to_its_tail(sizes: tuple[int, int, int]) -> None:
    num_streams, block, more = sizes
    streams = make(*sizes)
    stretch = (num_streams * 2 * block + more) // num_streams
    read = torch.cat([streams.next().inputs for _ in range(streams.blocks_per_epoch)], dim=1)
    assert 0 <= stretch - 1 - read.shape[1] < block  # the last token is a target only
    for index, line in enumerate(read):
        assert line.tolist() == list(range(index * stretch, index * stretch + read.shape[1]))


@given(SIZES, st.integers(0, 9))
def test_blocks_are_consecutive_and_never_leave_their_stretch_in_any_epoch(
    sizes: tuple[int, int, int], seed: int
) -> None:
    num_streams, block, more = sizes
    streams = make(*sizes, seed=seed)
    stretch = (num_streams * 2 * block + more) // num_streams
    owner = torch.arange(num_streams)[:, None]
    expected = None
    for _ in range(40):
        batch = streams.next()
        assert batch.inputs.shape == batch.targets.shape == (num_streams, block)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert torch.equal(batch.targets, batch.inputs + 1)
        assert torch.equal(batch.targets // stretch, owner.expand_as(batch.targets))
        assert torch.equal(batch.inputs // stretch, owner.expand_as(batch.inputs))
        if not batch.reset.all():
            assert torch.equal(batch.inputs[:, 0], expected)
        expected = batch.inputs[:, -1] + 1


@given(SIZES, st.integers(0, 9), st.integers(0, 25))
def test_resumed_streams_read_what_uninterrupted_ones_read(sizes: tuple[int, int, int], seed: int, before: int) -> None:
    whole = make(*sizes, seed=seed, reset_prob=0.3)
    for _ in range(before):
        whole.next()
    resumed = make(*sizes, seed=seed + 1, reset_prob=0.3)
    resumed.load_state_dict(through_a_file(whole.state_dict()))
    assert resumed.epochs == whole.epochs
    assert all(same(whole.next(), resumed.next()) for _ in range(25))


def test_every_stream_forgets_at_the_start_of_an_epoch_and_only_there_without_random_resets() -> None:
    streams = make(3, 4, 60)
    resets = [streams.next().reset for _ in range(streams.blocks_per_epoch * 3)]
    assert resets[0].all()
    assert resets[streams.blocks_per_epoch].all()
    assert not any(reset.any() for reset in resets[1 : streams.blocks_per_epoch])
    assert all(reset.all() or not reset.any() for reset in resets)


@given(SIZES, st.integers(1, 4), st.integers(0, 9))
def test_what_several_processes_read_is_together_what_one_reads_and_no_token_twice(
    sizes: tuple[int, int, int], num_processes: int, seed: int
) -> None:
    per_process, block, more = sizes
    num_streams = per_process * num_processes
    parts = [slice(rank * per_process, (rank + 1) * per_process) for rank in range(num_processes)]
    tokens = np.arange(num_streams * 2 * block + more)
    alone, *shared = (
        Streams(tokens, num_streams=num_streams, block=block, seed=seed, reset_prob=0.3, own=own)
        for own in (slice(None), *parts)
    )
    for _ in range(12):
        whole, batches = alone.next(), [streams.next() for streams in shared]
        for name in ("inputs", "targets", "reset"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in batches]), getattr(whole, name))
        assert len(torch.cat([batch.inputs for batch in batches]).unique()) == num_streams * block
        assert all(streams.state_dict() == alone.state_dict() for streams in shared)


def test_random_resets_come_as_often_as_asked_and_move_no_text() -> None:
    calm, forgetful = make(8, 2, 8000), make(8, 2, 8000, reset_prob=0.25)
    blocks = [(calm.next(), forgetful.next()) for _ in range(400)]
    assert all(torch.equal(one.inputs, other.inputs) for one, other in blocks)
    share = torch.stack([other.reset for _, other in blocks[1:]]).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03)


def test_later_epochs_cut_the_text_at_other_places() -> None:
    streams = make(1, 16, 200)
    phases = []
    for _ in range(200):
        batch = streams.next()
        if batch.reset.all():
            phases.append(int(batch.inputs[0, 0]))
    assert phases[0] == 0
    assert all(0 <= phase < 16 for phase in phases)
    assert len(set(phases)) > 5


def test_epochs_count_what_has_been_read() -> None:
    streams = make(1, 10, 80)  # 100 tokens: 9 blocks
    assert streams.epochs == 0
    for _ in range(5):
        streams.next()
    assert streams.epochs == 0.5
    for _ in range(5):
        streams.next()
    assert 1 <= streams.epochs < 1.2


def test_too_few_tokens_are_refused_with_the_number_that_would_do() -> None:
    make(3, 5, 0)
    with pytest.raises(ConfigError, match=r"29 tokens are too few .*batch = 3 .*block = 5: at least 30"):
        make(3, 5, -1)

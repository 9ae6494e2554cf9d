"""Tiled attention for CPUs against the definition: outputs and every gradient, also at the edges of tiles."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import model.network.tiled
from model.attention import Block, chunked_attention
from model.network.tiled import tiled_attention

NAMES = ("query", "key", "value", "persistent key", "persistent value", "position", "mass")


class Case(NamedTuple):
    heads: int = 2
    streams: int = 3
    block: int = 150  # two tiles; the second is shorter
    slots: int = 37
    pairs: int = 5
    head_size: int = 8
    filled: tuple[int, ...] | None = None

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        draw = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

        pairs = (self.heads, self.pairs, self.head_size)
        length = self.slots + self.block
        mass = torch.linspace(-0.3, 1.3, self.slots, dtype=torch.float64).clamp(0, 1).repeat(self.heads, 1)
        return [
            random(self.heads, self.streams, self.block, self.head_size),
            random(self.heads, self.streams, length, self.head_size),
            random(self.heads, self.streams, length, self.head_size),
            random(*pairs),
            random(*pairs),
            random(self.head_size, self.slots),
            mass.to(torch.promote_types(dtype, torch.float32)).requires_grad_(),
        ]

    def attend(self, function, tensors: list[Tensor], *, dropout: float = 0.0) -> Tensor:
        query, key, value, persistent_key, persistent_value, position, mass = tensors
        filled = None if self.filled is None else torch.tensor(self.filled)
        persistent = Block(persistent_key, persistent_value)
        return function(
            query, key, value, persistent, position=position, mass=mass, filled=filled, dropout=dropout
        )  # fmt: skip


CASES = {
    "several tiles": Case(),
    "one token": Case(block=1),
    "one slot": Case(slots=1),
    "fresh streams": Case(filled=(0, 0, 0)),
    "streams of every age": Case(filled=(0, 20, 500)),
    "a tile exactly": Case(block=model.network.tiled.TILE_TOKENS),
}


def compare(case: Case, *, dropout: float = 0.0) -> dict[str, float]:
    """The largest difference of the outputs and of each gradient, as a share of the largest number."""
    found = []
    for function in (chunked_attention, tiled_attention):
        tensors = case.tensors()
        out = case.attend(function, tensors, dropout=dropout)
        slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        found.append([out.detach(), *torch.autograd.grad(out, tensors, slope)])
    names = ("output", *NAMES)
    return {
        name: float((one - two).abs().max() / one.abs().max().clamp(min=1e-2))
        for name, one, two in zip(names, *found, strict=True)
    }


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_equals_the_definition_forward_and_backward(case):
    assert all(difference < 1e-11 for difference in compare(case).values()), compare(case)


def test_small_tiles_give_the_same(monkeypatch):
    monkeypatch.setattr(model.network.tiled, "TILE_TOKENS", 16)
    monkeypatch.setattr(model.network.tiled, "TILE_BYTES", 1)
    assert all(difference < 1e-11 for difference in compare(Case(filled=(0, 20, 500))).values())


def test_the_edge_of_a_mask_has_a_gradient_where_the_mask_is_zero():
    case = Case(block=8)
    tensors = case.tensors()
    zero = int((tensors[-1][0] == 0).nonzero()[-1])
    slope = torch.autograd.grad(case.attend(tiled_attention, tensors).square().sum(), tensors[-1])[0]
    assert slope[:, zero].abs().min() > 1e-3


def test_dropout_drops_the_share_it_is_told_to_and_has_its_own_gradient():
    case = Case(heads=1, streams=1, block=3, slots=4, pairs=3, head_size=2)

    def seeded(*tensors: Tensor) -> Tensor:
        torch.manual_seed(4)
        return case.attend(tiled_attention, list(tensors), dropout=0.4)

    *rest, mass = case.tensors()
    assert torch.autograd.gradcheck(seeded, [*rest, (mass.detach() + 0.1).requires_grad_()])
    wide = Case(heads=1, streams=8, block=64, slots=64, pairs=64)
    tensors = wide.tensors()
    tensors[2] = torch.ones_like(tensors[2])
    tensors[4] = torch.ones_like(tensors[4])
    kept = wide.attend(
        tiled_attention, tensors, dropout=0.4
    )  # all values are 1: the sum of the kept probabilities, scaled up
    assert kept.mean().item() == pytest.approx(1, abs=0.02)
    assert kept.std() > 0.05


def test_the_gradient_is_that_of_finite_differences():
    case = Case(heads=1, streams=2, block=3, slots=4, pairs=3, head_size=2, filled=(1, 9))
    *rest, _ = case.tensors()
    mass = torch.tensor([[0.2, 0.6, 0.9, 1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *tensors: case.attend(tiled_attention, list(tensors)), [*rest, mass])


def test_in_bfloat16_it_is_as_close_to_the_truth_as_the_definition_is():
    case = Case(streams=4, slots=64, pairs=32, head_size=16)
    truth = case.tensors()
    slope = torch.randn(2, 4, 150, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = torch.autograd.grad(case.attend(chunked_attention, truth), truth, slope)
    errors = []
    for function in (chunked_attention, tiled_attention):
        rounded = case.tensors(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            out = case.attend(function, rounded)
        found = torch.autograd.grad(out, rounded, slope.to(out.dtype))
        errors.append([float((one - two).norm() / two.norm()) for one, two in zip(found, exact, strict=True)])
    for name, definition, tiled in zip(NAMES, *errors, strict=True):
        assert tiled < 1.5 * definition + 0.003, (name, definition, tiled)
        assert tiled < 0.1, (name, tiled)

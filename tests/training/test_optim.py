"""Optimizers: the paper's Adagrad against scalar loops and torch's; weight decay, clipping, schedules, resuming."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from training.config import OptimConfig
from training.optim import ClippedAdagrad, Optimizer, learning_rate

SHAPES = ((3, 4), (5,), (2, 3, 2))


def configure(**changes: Any) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 0.1, "max_steps": 100} | changes)


def gradients(seed: int, *, scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in gradients(99, scale=1.0)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def learn(model: nn.Module, optimizer: Optimizer, *, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.clip()
        optimizer.step(step=step, share=step / 100)


def scalar_adagrad(
    values: list[float], sums: list[float], slopes: list[float], *, lr: float, clip: float, decay: float
) -> None:
    """One update of one parameter, element by element, in place."""
    slopes = [slope + decay * value for slope, value in zip(slopes, values, strict=True)]
    norm = math.sqrt(sum(slope * slope for slope in slopes))
    rate = lr * clip / (norm + 1e-10) if clip and norm > clip else lr
    for index, slope in enumerate(slopes):
        sums[index] += slope * slope
        values[index] -= rate * slope / (math.sqrt(sums[index]) + 1e-10)


@pytest.mark.parametrize("clip", [0.0, 0.03, 2.5, 1e9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adagrad_does_what_the_scalar_loop_does(clip: float, decay: float) -> None:
    ours = parameters()
    optimizer = ClippedAdagrad(ours, lr=0.07, grad_clip=clip)
    optimizer.param_groups[0]["weight_decay"] = decay
    values = [parameter.detach().flatten().tolist() for parameter in ours]
    sums = [[0.0] * len(value) for value in values]
    for step in range(6):
        slopes = gradients(step, scale=10.0 ** (step % 3 - 1))  # some norms are below the clip, some above
        for index, (parameter, slope) in enumerate(zip(ours, slopes, strict=True)):
            parameter.grad = slope
            scalar_adagrad(values[index], sums[index], slope.flatten().tolist(), lr=0.07, clip=clip, decay=decay)
        optimizer.step()
    for parameter, value in zip(ours, values, strict=True):
        torch.testing.assert_close(parameter.flatten(), torch.tensor(value, dtype=torch.float64), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("clip", [0.0, 1e9])
def test_adagrad_without_clipping_is_torchs(clip: float) -> None:
    ours, theirs = parameters(), parameters()
    one = ClippedAdagrad(ours, lr=0.07, grad_clip=clip)
    other = torch.optim.Adagrad(theirs, lr=0.07, eps=1e-10)
    for step in range(5):
        for left, right, slope in zip(ours, theirs, gradients(step, scale=1.0), strict=True):
            left.grad, right.grad = slope, slope.clone()
        one.step()
        other.step()
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_adagrad_leaves_a_parameter_without_gradient_and_every_gradient_as_they_are() -> None:
    used, unused = parameters()[:2]
    before = unused.detach().clone()
    used.grad = torch.full_like(used, 3.0)
    ClippedAdagrad([used, unused], lr=0.07, grad_clip=0.03).step()
    assert torch.equal(unused, before)
    assert torch.equal(used.grad, torch.full_like(used, 3.0))


@pytest.mark.parametrize("name", ["adamw", "adagrad"])
def test_matrices_are_decayed_and_vectors_are_not(name: str) -> None:
    model = network()
    before = copy.deepcopy(model)
    optimizer = Optimizer(model, configure(name=name, weight_decay=0.5, grad_clip=0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(step=0, share=0.0)
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        if old.dim() >= 2:
            assert new.abs().sum() < old.abs().sum()
        else:
            assert torch.equal(old, new)


@pytest.mark.parametrize(("name", "bound"), [("adamw", 0.5), ("adagrad", None)])
def test_adamw_bounds_the_global_norm_and_adagrad_leaves_that_to_its_step(name: str, bound: float | None) -> None:
    model = network()
    optimizer = Optimizer(model, configure(name=name, grad_clip=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = math.sqrt(sum(parameter.numel() for parameter in model.parameters()))
    assert optimizer.clip() == pytest.approx(norm)
    slopes = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    after = torch.cat([slope.flatten() for slope in slopes]).norm().item()
    assert after == pytest.approx(norm if bound is None else bound, rel=1e-5)


def test_a_clip_of_zero_is_off() -> None:
    model = network()
    optimizer = Optimizer(model, configure(grad_clip=0))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    optimizer.clip()
    assert all(bool((parameter.grad == 100).all()) for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    model = network()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    assert math.isnan(Optimizer(model, configure()).clip())


@pytest.mark.parametrize("name", ["adamw", "adagrad"])
def test_a_step_uses_the_scheduled_rate_and_forgets_the_gradients(name: str) -> None:
    model = network()
    config = configure(name=name, schedule="cosine", warmup_steps=4)
    optimizer = Optimizer(model, config)
    model(torch.ones(1, 4)).sum().backward()
    assert optimizer.step(step=1, share=0.3) == learning_rate(config, step=1, share=0.3)
    assert all(parameter.grad is None for parameter in model.parameters())


class Persistent(nn.Module):
    """A model whose hidden weights Muon updates; one of them has a matrix for each of two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 6)])
        self.layers[0].register_parameter("persistent", nn.Parameter(torch.randn(2, 3, 6)))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.layers[0](inputs)
        output: Tensor = self.layers[1](hidden + self.layers[0].persistent.sum((0, 1)).tanh())
        return output


@pytest.mark.parametrize("name", ["adamw", "adagrad", "muon"])
def test_what_is_saved_of_an_optimizer_is_told_by_the_names_of_parameters(name: str) -> None:
    model = Persistent()
    optimizer = Optimizer(model, configure(name=name))
    learn(model, optimizer, steps=range(1))
    names = {parameter for parameter, _ in model.named_parameters()}
    if name == "muon":
        names = names - {"layers.0.weight", "layers.1.weight", "layers.0.persistent"}
        names |= {"layers.0.weight[0]", "layers.1.weight[0]", "layers.0.persistent[0]", "layers.0.persistent[1]"}
    assert optimizer.state_dict().keys() == names


def test_a_resumed_muon_goes_on_bit_by_bit() -> None:
    config = configure(name="muon", weight_decay=0.1)
    whole = Persistent()
    optimizer = Optimizer(whole, config)
    learn(whole, optimizer, steps=range(4))
    resumed = copy.deepcopy(whole)
    again = Optimizer(resumed, config)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    learn(whole, optimizer, steps=range(4, 9))
    learn(resumed, again, steps=range(4, 9))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "adagrad"])
def test_a_resumed_optimizer_goes_on_bit_by_bit(name: str) -> None:
    config = configure(name=name, schedule="cosine", warmup_steps=3, weight_decay=0.1, grad_clip=0.2)
    whole = network()
    optimizer = Optimizer(whole, config)
    learn(whole, optimizer, steps=range(4))
    resumed = copy.deepcopy(whole)
    again = Optimizer(resumed, config)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    learn(whole, optimizer, steps=range(4, 9))
    learn(resumed, again, steps=range(4, 9))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_warm_up_rises_in_a_line_to_the_peak_and_stays() -> None:
    config = configure(warmup_steps=4)
    rates = [learning_rate(config, step=step, share=step / 100) for step in range(6)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    (
        "schedule",
        "expected",
    ),  # learning rates as shares of the peak, at these shares of the run: 0, 0.5, 0.74, 0.75, 0.875, 1
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("cosine", [0.1 + 0.45 * (1 + math.cos(turn * math.pi)) for turn in (0, 0.5, 0.74, 0.75, 0.875, 1)]),
        ("trapezoid", [1, 1, 1, 1, 0.55, 0.1]),
        ("step", [1, 1, 1, 0.1, 0.1, 0.1]),
    ],
)
def test_a_schedule_falls_where_and_as_far_as_it_says(schedule: str, expected: list[float]) -> None:
    config = configure(schedule=schedule, decay_fraction=0.25, final_lr_fraction=0.1)
    shares = [0, 0.5, 0.74, 0.75, 0.875, 1]
    rates = [learning_rate(config, step=50, share=share) for share in shares]
    assert rates == pytest.approx([0.1 * share for share in expected])


@given(
    schedule=st.sampled_from(["constant", "cosine", "trapezoid", "step"]),
    decay=st.floats(0.01, 1),
    final=st.floats(0, 1),
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted),
)
def test_after_the_warm_up_the_rate_never_rises_and_keeps_between_its_end_and_its_peak(
    schedule: str, decay: float, final: float, shares: list[float]
) -> None:
    config = configure(schedule=schedule, decay_fraction=decay, final_lr_fraction=final)
    early, late = (learning_rate(config, step=9, share=share) for share in shares)
    assert 0.1 * final - 1e-12 <= late <= early + 1e-12 <= 0.1 + 2e-12

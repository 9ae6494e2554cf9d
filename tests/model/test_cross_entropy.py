"""The loss that computes its scores chunk by chunk against the plain loss: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import cross_entropy
from model.cross_entropy import summed_nats


def inputs(num_positions: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and targets; scores of the order of 3, so that some tokens are almost certain."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((num_positions, 6), (11, 6), (11,))
    made = [torch.randn(shape, generator=generator, dtype=dtype).mul_(1.5).requires_grad_() for shape in shapes]
    return made[0], made[1], made[2], torch.randint(11, (num_positions,), generator=generator)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    scores = F.linear(hidden, weight, bias)
    return F.cross_entropy(scores if scores.dtype == torch.float64 else scores.float(), targets, reduction="sum")


def with_gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradients, with the loss scaled by an odd number as in training."""
    return loss.detach(), *torch.autograd.grad(loss / 7, of)


@pytest.fixture(autouse=True)
def chunks_of_7(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_SCORES", {"cpu": 7 * 11})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("num_positions", [1, 7, 21, 40], ids=lambda n: f"{n} positions")
def test_value_and_gradients_equal_the_plain_form(num_positions: int, dtype: torch.dtype, tolerance: float) -> None:
    *parts, targets = inputs(num_positions, dtype)
    found = with_gradients(summed_nats(*parts, targets), *parts)
    wanted = with_gradients(plain(*parts, targets), *parts)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_under_autocast_it_is_as_near_to_the_truth_as_the_plain_form() -> None:
    *parts, targets = inputs(40)
    truth = with_gradients(plain(*parts, targets), *parts)
    with torch.autocast("cpu", torch.bfloat16):
        fused, usual = summed_nats(*parts, targets), plain(*parts, targets)
    assert fused.dtype == torch.float32
    found, wanted = with_gradients(fused, *parts), with_gradients(usual, *parts)
    assert found[0] == pytest.approx(wanted[0].item(), rel=1e-6)  # the same products, and all the rest in fp32
    for one, other, true in zip(found, wanted, truth, strict=True):
        assert one.dtype == torch.float32
        assert (one - true).norm() <= 1.5 * (other - true).norm() + 1e-6


def test_large_scores_do_not_overflow() -> None:
    *parts, targets = inputs(9)
    with torch.no_grad():
        parts[0].mul_(300)
    found = with_gradients(summed_nats(*parts, targets), *parts)
    wanted = with_gradients(plain(*parts, targets), *parts)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_without_gradients_the_value_is_the_same_and_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    *parts, targets = inputs(40)
    wanted = summed_nats(*parts, targets)
    monkeypatch.setattr(cross_entropy, "_SummedNats", None)
    with torch.no_grad():
        assert torch.equal(summed_nats(*parts, targets), wanted)
    assert torch.equal(summed_nats(*(part.detach() for part in parts), targets), wanted)

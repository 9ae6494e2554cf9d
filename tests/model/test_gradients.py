"""Every gradient of the training attention against autograd through the oracle's literal form."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.attention import Block, banded_attention
from model.config import ModelConfig
from model.spans import span_mask
from tests import oracle

MAX_SPAN, RAMP, NUM_PERSISTENT, NUM_QUERIES, HEAD = 12, 4, 3, 5, 4
Form = Callable[..., Tensor]  # from the tensors of `attention_inputs`, by name, to [H, M, D]
SPAN_PAIRS = {
    "zero, the official start": (0.0, 0.0),
    "distances exactly on both edges of the ramp": (0.25, 0.5),
    "one": (1.0, 1.0),
    "random": (0.37, 0.81),
    "zero beside one": (0.0, 1.0),
}


def attention_inputs(span: tuple[float, float], num_empty: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    inputs = {
        "query": 2 * draw(2, NUM_QUERIES, HEAD),
        "key": draw(2, MAX_SPAN + NUM_QUERIES, HEAD),
        "value": draw(2, MAX_SPAN + NUM_QUERIES, HEAD),
        "position": draw(HEAD, MAX_SPAN),
        "persistent_key": draw(2, NUM_PERSISTENT, HEAD) / HEAD**0.5,
        "persistent_value": draw(2, NUM_PERSISTENT, HEAD) / NUM_PERSISTENT**0.5,
        "span": torch.tensor(span, dtype=torch.float64),
    }
    inputs["key"][:, :num_empty] = inputs["value"][:, :num_empty] = 0
    return inputs


def output_and_gradients(form: Form, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output of a form of attention, [H, M, D], and the gradients of a fixed loss with respect to all inputs."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    output = form(**leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(13), dtype=output.dtype)
    gradients = torch.autograd.grad((output * weights).sum(), list(leaves.values()))
    return {"output": output.detach()} | dict(zip(leaves, gradients, strict=True))


def as_trained(num_empty: int, mode: str, *, span_ramp: int = RAMP) -> Form:
    """The training form with the oracle's arguments."""
    config = ModelConfig(
        vocab_size=2,
        num_layers=1,
        width=2 * HEAD,
        num_heads=2,
        num_persistent=NUM_PERSISTENT,
        max_span=MAX_SPAN,
        span_ramp=span_ramp,
    )

    def form(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        persistent_key: Tensor,
        persistent_value: Tensor,
        span: Tensor,
    ) -> Tensor:
        return banded_attention(
            (query / HEAD**0.5)[:, None],
            key[:, None],
            value[:, None],
            Block(persistent_key * HEAD**0.5, persistent_value * NUM_PERSISTENT**0.5),
            position=position.flip(-1),
            mass=span_mask(span, num_slots=MAX_SPAN, config=config).flip(-1),
            filled=torch.tensor([MAX_SPAN - num_empty]) if mode == "masked" else None,
        )[:, 0]

    return form


def named(name: str) -> Callable[[str], str]:
    """A message for assert_close that says which tensor differs."""
    return lambda text: f"{name}: {text}"


@pytest.mark.parametrize("span", SPAN_PAIRS.values(), ids=SPAN_PAIRS)
@pytest.mark.parametrize(("num_empty", "mode"), [(0, "masked"), (9, "masked"), (MAX_SPAN, "masked"), (9, "zero")])
def test_every_gradient_of_attention_equals_the_literal_forms(
    span: tuple[float, float], num_empty: int, mode: str
) -> None:
    inputs = attention_inputs(span, num_empty)
    literal = functools.partial(oracle.attend, span_ramp=RAMP, num_empty=num_empty if mode == "masked" else 0)
    wanted, got = output_and_gradients(literal, inputs), output_and_gradients(as_trained(num_empty, mode), inputs)
    for name in wanted:  # masks are computed in fp32, and the literal form adds 1e-8 to its denominators
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-5, msg=named(name))
    assert all(torch.isfinite(value).all() for value in got.values())


def test_a_wrong_ramp_would_be_noticed_in_the_gradients() -> None:
    inputs = attention_inputs(SPAN_PAIRS["zero, the official start"], 0)
    wanted = output_and_gradients(functools.partial(oracle.attend, span_ramp=RAMP), inputs)
    got = output_and_gradients(as_trained(0, "masked", span_ramp=RAMP + 1), inputs)
    assert all((got[name] - wanted[name]).abs().max() > 1e-2 for name in wanted)

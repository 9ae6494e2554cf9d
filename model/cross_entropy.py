"""Linear output layer and cross-entropy in one: the loss of a block without holding all its scores in memory.

Scores are computed for a few positions at a time, and their gradient directly afterwards, while they are in cache. Only
the gradients of the inputs are kept. (torch 2.13 has `linear_cross_entropy`: in bf16 on a CPU it is slower than the
plain form and sums the loss in bf16.)

Sizes: P positions, p of them at a time, E width, V classes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_SCORES = {"cpu": 2**21, "cuda": 2**26}  # p V: scores that stay in cache, or that keep a GPU busy


def summed_nats(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy -log softmax(hidden weight^T + bias)[targets], summed over positions: a scalar, fp32 (or fp64).

    Under autocast, products are in autocast's dtype, but softmax, sums and the gradients of weights are in fp32.
    Gradients are computed together with the loss, so the loss can be differentiated only once.

    Args:
        hidden: [P, E].
        weight, bias: [V, E] and [V].
        targets: [P] int64.
    """
    inputs = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        nats: Tensor = _SummedNats.apply(*inputs, targets)  # type: ignore[no-untyped-call]
        return nats
    return _chunk_by_chunk(*inputs, targets, gradients=None)


class _SummedNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        sum_dtype = _sum_dtype(weight)
        gradients = (
            torch.empty_like(hidden),
            torch.zeros_like(weight, dtype=sum_dtype),
            torch.zeros_like(bias, dtype=sum_dtype),
        )
        nats = _chunk_by_chunk(hidden, weight, bias, targets, gradients=gradients)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            gradient.mul_(grad_output).to(dtype) for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None


def _chunk_by_chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *, gradients: tuple[Tensor, Tensor, Tensor] | None
) -> Tensor:
    """The summed cross-entropy; fills in `gradients` of hidden [P, E], weight [V, E] and bias [V], if given."""
    num_classes, width = weight.shape
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    states, table, offset = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    # With at least E positions at a time, summing the gradient of the weight costs no more than computing the scores.
    chunk = max(1, min(len(hidden), max(width, CHUNK_SCORES[kind] // num_classes)))
    products = states.new_empty(chunk, num_classes)
    scratch = products if dtype == _sum_dtype(weight) else products.new_empty(products.shape, dtype=_sum_dtype(weight))
    nats = scratch.new_zeros(())
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        state, target = states[part], targets[part, None]
        product = torch.addmm(offset, state, table.mT, out=products[: len(state)])  # [p, V]
        scores = product if scratch is products else scratch[: len(state)].copy_(product)
        scores -= scores.amax(-1, keepdim=True)
        target_scores = scores.gather(-1, target)
        total = scores.exp_().sum(-1, keepdim=True)
        nats += (total.log() - target_scores).sum()
        if gradients is None:
            continue
        grad_scores = scores.mul_(total.reciprocal()).scatter_add_(
            -1, target, target_scores.new_full(target_scores.shape, -1)
        )
        gradients[2].add_(grad_scores.sum(0))
        product = grad_scores if scratch is products else product.copy_(grad_scores)
        gradients[0][part] = product @ table
        if scratch is products:
            gradients[1].addmm_(product.mT, state)
        else:
            gradients[1].add_(product.mT @ state)
    return nats


def _sum_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32

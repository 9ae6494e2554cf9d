"""Attention over context and persistent vectors under one softmax: the definition, and its twin for decoding.

Sizes: B rows, H heads, T new tokens, S context slots, N persistent vectors, D head size.
Queries arrive scaled by 1/sqrt(D), persistent pairs by sqrt(D) and sqrt(N). Knows no layers and no weights.

The definition works head first, [H, B, T, D], so that persistent vectors, shared by all rows, are one product per head.
The twin works row first, [B, H, D], so that the first rows of a ring are one contiguous piece of memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # queries that attend together: a wide band wastes products, a narrow band wastes kernel launches


class Block(NamedTuple):
    """Key/value pairs that take part in one joint softmax.

    `bias` is added to the scores of the pairs. `mass` multiplies their probabilities before all probabilities are
    renormalised: that equals a bias of log(mass) where the mass is positive, and has an exact
    gradient where the mass is zero.
    """

    key: Tensor  # [H, B, S, D], or [H, N, D] when all rows share them
    value: Tensor  # same shape as key
    bias: Tensor | None = None  # broadcasts to [H, B, T, S]
    mass: Tensor | None = None  # broadcasts to [H, B, T, S]


def joint_attention(
    query: Tensor, blocks: Sequence[Block], *, dropout: float = 0.0, shares: list[Tensor] | None = None
) -> Tensor:
    """Attend to all blocks under one softmax (arXiv 1907.01470, equations 6 to 8, with the span mask of 1905.07799).

    Args:
        query: [H, B, T, D], scaled.
        blocks: at least one block; every query must reach at least one key.
        dropout: share of the probabilities that is set to zero; the other probabilities are scaled up.
        shares: if given, each block's share of every query's attention, [H, B, T], is appended to it, block by
            block. Only for blocks without `mass`.

    Returns:
        [H, B, T, D], in the dtype of the values.
    """
    scores = [_with_bias(_product(query, block.key.mT), block.bias) for block in blocks]
    probabilities = torch.softmax(torch.cat(scores, -1), -1)  # [H, B, T, all S]
    parts = torch.split(probabilities, [score.shape[-1] for score in scores], -1)
    output, total = None, None
    for part, block in zip(parts, blocks, strict=True):
        if block.mass is not None:
            part = part * block.mass
        if any(other.mass is not None for other in blocks):
            share = part.sum(-1, keepdim=True)
            total = share if total is None else total + share
        if shares is not None:
            shares.append(part.sum(-1))
        if dropout:
            part = F.dropout(part, dropout)
        product = _product(part.to(block.value.dtype), block.value)
        output = product if output is None else output + product
    assert output is not None, "joint_attention needs a block"
    # The lower bound matters only where masked keys outweigh all others by 1e38: there the output is 0, not 0 / 0.
    return output if total is None else output / total.clamp(min=torch.finfo(total.dtype).tiny)


def banded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    persistent: Block,
    *,
    position: Tensor,
    mass: Tensor | None = None,
    log_mass: Tensor | None = None,
    filled: Tensor | None = None,
    dropout: float = 0.0,
    shares: list[Tensor] | None = None,
) -> Tensor:
    """Attend from each of T consecutive tokens to the S positions before it and to the persistent vectors.

    Args:
        query: [H, B, T, D].
        key, value: [H, B, S + T, D], oldest first: the S positions before the first query, then the T new tokens.
        position: [D, S], in the order of the keys: column s is the vector of distance S - s.
        mass, log_mass: [H, S], in the same order: the soft span mask of each head, or its logarithm; give exactly one.
        filled: [B], how many of the S earlier positions exist in each row; None if all do.
        shares: as in `joint_attention`; the context comes first, then the persistent vectors.

    Returns:
        [H, B, T, D].
    """
    num_new = query.shape[2]
    by_distance = query @ position  # [H, B, T, S]
    if log_mass is not None:
        by_distance = by_distance + log_mass[:, None, None]
    bias = to_band(by_distance, outside=float("-inf"))  # [H, B, T, S + T]
    if filled is not None:
        slot = torch.arange(key.shape[2], device=key.device)
        empty = slot < (position.shape[1] - filled.to(key.device))[:, None]  # [B, S + T]
        bias = bias.masked_fill(empty[:, None, :], float("-inf"))
    if mass is not None:
        mass = to_band(mass[:, None, :].expand(-1, num_new, -1), outside=0.0)[:, None]  # [H, 1, T, S + T]
    return joint_attention(query, (Block(key, value, bias, mass), persistent), dropout=dropout, shares=shares)


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    persistent: Block,
    *,
    position: Tensor,
    mass: Tensor,
    filled: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`banded_attention` of a long block, CHUNK queries at a time: one band over all queries would be mostly empty."""
    num_slots, num_new = position.shape[1], query.shape[2]
    outputs = []
    for start in range(0, num_new, CHUNK):
        stop = min(start + CHUNK, num_new)
        window = slice(start, num_slots + stop)
        outputs.append(
            banded_attention(
                query[:, :, start:stop],
                key[:, :, window],
                value[:, :, window],
                persistent,
                position=position,
                mass=mass,
                filled=None if filled is None else filled + start,
                dropout=dropout,
            )
        )
    return torch.cat(outputs, 2)


def to_band(by_distance: Tensor, *, outside: float) -> Tensor:
    """Shift row t of [..., T, S] right by t: columns that count distance become columns of keys, [..., T, S + T]."""
    *lead, num_rows, num_slots = by_distance.shape
    width = num_slots + num_rows
    padded = F.pad(by_distance, (0, num_rows + 1), value=outside)  # [..., T, S + T + 1]
    return padded.flatten(-2)[..., : num_rows * width].view(*lead, num_rows, width)


def decode_attention(
    query: Tensor, rings: Sequence[tuple[Tensor, Tensor]], tables: Sequence[tuple[Tensor, Tensor]], persistent: Block
) -> Tensor:
    """Equal to `joint_attention` for one new token a row, over rings of different sizes; copies no ring.

    Args:
        query: [B, H, D], scaled; the heads of the first ring come first.
        rings: key and value [B, h, S, D] of each group of h heads, slots in any order.
        tables: for each ring, position vectors [B, D, S] and bias [B, h, S] of its slots (-inf where a slot is empty).
        persistent: key [H, D, N] (transposed once, when baked) and value [H, N, D].

    Returns:
        [B, H, D].
    """
    by_head = query.transpose(0, 1)  # [H, B, D]
    persistent_scores = torch.bmm(by_head, persistent.key).transpose(0, 1)  # [B, H, N]
    outputs, shares, first = [], [], 0
    for (key, value), (position, bias) in zip(rings, tables, strict=True):
        num_rows, num_heads, num_slots, head_size = key.shape
        heads = slice(first, first + num_heads)
        first = heads.stop
        group_query = query[:, heads]  # [B, h, D]
        scores = torch.baddbmm(bias, group_query, position).view(-1, 1, num_slots)
        scores = torch.baddbmm(scores, group_query.reshape(-1, 1, head_size), key.reshape(-1, num_slots, head_size).mT)
        joint = torch.cat((scores.view(num_rows, num_heads, num_slots), persistent_scores[:, heads]), -1)
        probabilities = torch.softmax(joint, -1)  # [B, h, S + N]
        context = probabilities[..., :num_slots].reshape(-1, 1, num_slots)
        outputs.append(torch.bmm(context, value.reshape(-1, num_slots, head_size)).view(num_rows, num_heads, head_size))
        shares.append(probabilities[..., num_slots:])
    share = shares[0] if len(shares) == 1 else torch.cat(shares, 1)  # [B, H, N]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)  # [B, H, D]
    return output + torch.bmm(share.transpose(0, 1), persistent.value).transpose(0, 1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[H, B, T, X] @ [H, B, X, Y] or, shared by all rows, @ [H, X, Y], without copying `right` for every row."""
    if right.dim() == 4:
        return left @ right
    heads, rows, num_new, _ = left.shape
    return (left.reshape(heads, rows * num_new, -1) @ right).view(heads, rows, num_new, -1)


def _with_bias(scores: Tensor, bias: Tensor | None) -> Tensor:
    return scores if bias is None else scores + bias

"""`chunked_attention` for training on CPUs: equal, forward and backward, but tile by tile and differentiated by hand.

On a CPU what costs is not the products but the passes over the scores, [H, B, M, S + N] numbers of each layer. Here
they are made, normalised and multiplied in memory that is used again and again; only the probabilities stay for the
backward pass; and the columns of a tile count distances, not keys, so that none is normalised in vain.

Sizes: H heads, B streams, M tokens of a block, T of a tile, S slots, N persistent vectors, D head size.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention import Block

TILE_TOKENS = 128  # T: more make the products with keys wider than the band they are for, fewer make them small
TILE_BYTES = 1 << 22  # of the scores of a tile; at 1 MiB, what a core has in cache of its own, the calls cost more
# What the span mask makes zero keeps this share of itself: too little to change a sum, enough to carry the gradient
# that the mask has at its very edge, where it is zero but about to rise (a fresh head: z = 0, distance R + 1).
FLOOR = 1e-20


@torch.compiler.disable  # type: ignore[untyped-decorator]  # made of large calls already: tracing the loop only costs
def tiled_attention(
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
    """Equal to `model.attention.chunked_attention` with the same arguments, forward and backward.

    Args:
        query: [H, B, M, D]; all tensors but `mass` have its dtype.
        key, value: [H, B, S + M, D], oldest first.
        persistent: key and value [H, N, D].
        position: [D, S], column s for distance S - s.
        mass: [H, S] fp32, the soft span mask.
        filled: [B], how many of the S earlier positions exist; None if all do.

    Returns:
        [H, B, M, D].
    """
    with torch.autocast("cpu", enabled=False):  # which would make softmax return, and read, numbers twice as wide
        out: Tensor = _TiledAttention.apply(  # type: ignore[no-untyped-call]
            filled, dropout, query, key, value, persistent.key, persistent.value, position, mass
        )
    return out


class _Inputs(NamedTuple):
    """The tensors of `tiled_attention`; or the gradient of each, sums over many tiles kept in fp32 at least."""

    query: Tensor  # [H, B, M, D]
    key: Tensor  # [H, B, S + M, D]
    value: Tensor
    persistent_key: Tensor  # [H, N, D]
    persistent_value: Tensor
    position: Tensor  # [D, S]
    mass: Tensor  # [H, S]

    def zeros(self) -> "_Inputs":
        exact = torch.promote_types(self.query.dtype, torch.float32)
        return _Inputs(
            *(torch.zeros_like(tensor) for tensor in self[:3]),
            *(torch.zeros_like(tensor, dtype=exact) for tensor in self[3:]),
        )


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, filled: Tensor | None, dropout: float, *inputs: Tensor) -> Tensor:
        work = _Pass(_Inputs(*inputs))
        out = torch.empty_like(inputs[0])
        kept = []
        for tile in work.tiles():
            probabilities, noise = work.probabilities(tile, filled=filled, dropout=dropout)
            kept += [probabilities] if noise is None else [probabilities, noise]
            dropped = probabilities if noise is None else probabilities * noise
            out[tile.head, tile.streams, tile.tokens] = work.values(tile, dropped)
        ctx.save_for_backward(*inputs, *kept)
        ctx.has_noise = dropout > 0
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        count, saved = len(_Inputs._fields), ctx.saved_tensors
        inputs, kept = _Inputs(*saved[:count]), iter(saved[count:])
        slopes = inputs.zeros()
        with torch.autocast("cpu", enabled=False):
            work = _Pass(inputs)
            for tile in work.tiles():
                probabilities, noise = next(kept), next(kept) if ctx.has_noise else None
                work.differentiate(tile, probabilities, noise, slope=slope, slopes=slopes)
        slopes.mass.div_(inputs.mass.clamp(min=FLOOR))
        return None, None, *(one.to(tensor.dtype) for one, tensor in zip(slopes, inputs, strict=True))


class _Tile(NamedTuple):
    """Some streams and tokens of one head."""

    head: int
    streams: slice
    tokens: slice  # of the block
    window: slice  # of the keys: all that these tokens look back on


class _Pass:
    """What is done with each tile. Scores have a row for each of the b T tokens, and S + N columns."""

    def __init__(self, inputs: _Inputs) -> None:
        self._inputs = inputs
        self._num_slots = inputs.position.shape[1]
        self._num_columns = self._num_slots + inputs.persistent_key.shape[1]
        self._log_mass = inputs.mass.clamp(min=FLOOR).log().to(inputs.query.dtype)
        self._scratch = _Scratch(inputs.query, num_slots=self._num_slots, num_columns=self._num_columns)

    def tiles(self) -> Iterator[_Tile]:
        heads, streams, num_new, _ = self._inputs.query.shape
        tokens = min(TILE_TOKENS, num_new)
        several = max(1, TILE_BYTES // (tokens * self._num_columns * self._inputs.query.element_size()))
        for head in range(heads):
            for start in range(0, num_new, tokens):
                stop = min(start + tokens, num_new)
                for first in range(0, streams, several):
                    own = slice(first, min(first + several, streams))
                    yield _Tile(head, own, slice(start, stop), slice(start, self._num_slots + stop))

    def probabilities(self, tile: _Tile, *, filled: Tensor | None, dropout: float) -> tuple[Tensor, Tensor | None]:
        """What falls on each distance and persistent vector, [b T, S + N], and what dropout multiplies that by."""
        head, inputs = tile.head, self._inputs
        query = inputs.query[head, tile.streams, tile.tokens]  # [b, T, D]
        flat = query.reshape(-1, query.shape[-1])
        scores = self._scratch.columns(len(flat))
        by_distance, shared = scores[:, : self._num_slots], scores[:, self._num_slots :]
        self._scratch.products_by_distance(query, inputs.key[head, tile.streams, tile.window], out=by_distance)
        by_distance.add_(torch.addmm(self._log_mass[head], flat, inputs.position))
        if filled is not None:
            _mask_empty(by_distance.view(*query.shape[:2], -1), filled[tile.streams] + tile.tokens.start)
        torch.mm(flat, inputs.persistent_key[head].mT, out=shared)
        noise = torch.empty_like(scores).bernoulli_(1 - dropout).div_(1 - dropout) if dropout else None
        return torch.softmax(scores, -1), noise

    def values(self, tile: _Tile, probabilities: Tensor) -> Tensor:
        """The mean of the values, [b, T, D]."""
        head, inputs = tile.head, self._inputs
        by_distance, shared = probabilities[:, : self._num_slots], probabilities[:, self._num_slots :]
        spread = self._scratch.spread(by_distance, like=inputs.query[head, tile.streams, tile.tokens])
        mean = torch.bmm(spread, inputs.value[head, tile.streams, tile.window])
        mean.view(len(shared), -1).addmm_(shared, inputs.persistent_value[head])
        return mean

    def differentiate(
        self, tile: _Tile, probabilities: Tensor, noise: Tensor | None, *, slope: Tensor, slopes: _Inputs
    ) -> None:
        """Add what the tile has to say to `slopes`; those of `mass` are still to be divided by it."""
        inputs, num_slots, head = self._inputs, self._num_slots, tile.head
        tokens, window = (head, tile.streams, tile.tokens), (head, tile.streams, tile.window)
        query, out = inputs.query[tokens], slope[tokens]  # [b, T, D]
        flat, flat_out = query.reshape(-1, query.shape[-1]), out.reshape(-1, out.shape[-1])
        dropped = probabilities if noise is None else probabilities * noise
        slopes.value[window].add_(torch.bmm(self._scratch.spread(dropped[:, :num_slots], like=query).mT, out))
        slopes.persistent_value[head].add_(dropped[:, num_slots:].mT @ flat_out)

        wanted = self._scratch.columns(len(flat))  # the slopes of the probabilities
        self._scratch.products_by_distance(out, inputs.value[window], out=wanted[:, :num_slots])
        torch.mm(flat_out, inputs.persistent_value[head].mT, out=wanted[:, num_slots:])
        if noise is not None:
            wanted.mul_(noise)
        scores = torch._softmax_backward_data(
            wanted, probabilities, -1, probabilities.dtype
        )  # the slopes of the scores
        by_distance, shared = scores[:, :num_slots], scores[:, num_slots:]

        slopes.mass[head].add_(by_distance.sum(0, dtype=slopes.mass.dtype))
        slopes.position.add_(flat.mT @ by_distance)
        slopes.persistent_key[head].add_(shared.mT @ flat)
        spread = self._scratch.spread(by_distance, like=query)
        slopes.key[window].add_(torch.bmm(spread.mT, query))
        part = torch.bmm(spread, inputs.key[window])
        part.view_as(flat).addmm_(by_distance, inputs.position.mT).addmm_(shared, inputs.persistent_key[head])
        slopes.query[tokens] = part


class _Scratch:
    """Memory that all tiles of a pass use in turn, and moves between two ways to number the context.

    Columns count keys, [b, T, S + T], or distances, [b T, S]: row t of the one, from column t on, is the other's.
    """

    def __init__(self, query: Tensor, *, num_slots: int, num_columns: int) -> None:
        self._num_slots, self._num_columns = num_slots, num_columns
        self._columns = self._products = self._spread = query.new_empty(0)

    def columns(self, rows: int) -> Tensor:
        """[rows, S + N], anything in it; valid until the next call."""
        if len(self._columns) < rows:
            self._columns = self._columns.new_empty(rows, self._num_columns)
        return self._columns[:rows]

    def products_by_distance(self, left: Tensor, right: Tensor, *, out: Tensor) -> None:
        """Of [b, T, D] and [b, S + T, D], each of the one with the S of the other that are before it, into [b T, S]."""
        shape = (*left.shape[:2], right.shape[1])
        if self._products.shape != shape:
            self._products = left.new_empty(shape)
        torch.bmm(left, right.mT, out=self._products)
        out.view(*shape[:2], -1).copy_(self._by_distance(self._products))

    def spread(self, by_distance: Tensor, *, like: Tensor) -> Tensor:
        """[b T, S] as [b, T, S + T], zero outside the band; valid until the next call. `like`: [b, T, D]."""
        shape = (*like.shape[:2], self._num_slots + like.shape[1])
        if self._spread.shape != shape:
            self._spread = by_distance.new_zeros(shape)  # and nothing is ever written outside the band
        self._by_distance(self._spread).copy_(by_distance.view(*shape[:2], -1))
        return self._spread

    def _by_distance(self, by_key: Tensor) -> Tensor:
        streams, tokens, width = by_key.shape
        return by_key.as_strided((streams, tokens, self._num_slots), (tokens * width, width + 1, 1))


def _mask_empty(by_distance: Tensor, filled: Tensor) -> None:
    """Exclude what was before a stream began. by_distance: [b, T, S]; filled: [b], positions before the first token."""
    _, tokens, num_slots = by_distance.shape
    if int(filled.min()) >= num_slots:
        return
    place = torch.arange(tokens)[:, None] + torch.arange(num_slots)  # [T, S], of the keys
    by_distance.masked_fill_(place < num_slots - filled[:, None, None], -math.inf)

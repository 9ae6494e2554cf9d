"""Training attention for CPUs: equal to `chunked_attention`, but computed in tiles and differentiated by hand.

On a CPU the passes over the scores, [H, B, M, S + N] numbers of each layer, cost more than the matrix products. Here
the scores are computed, normalised and multiplied in scratch memory that all tiles share, and only the probabilities
are kept for the backward pass. The columns of a tile are distances, not keys, so the softmax
meets no score outside the band.

Sizes: H heads, B streams (b in a tile), M tokens of a block (T in a tile), S slots, N persistent vectors, D head size.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention import Block

TILE_TOKENS = 128  # T: more tokens waste products outside the band, fewer tokens make the products small
TILE_BYTES = 1 << 22  # size of a tile's scores; at 1 MiB, a core's private cache, the overhead of calls costs more
# A probability that the span mask would make zero is multiplied by this instead: too small to change a sum, but enough
# to carry the gradient at the edge of the mask, where the mask is zero but starts to rise (a fresh head: z = 0,
# distance R + 1).
FLOOR = 1e-20


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it consists of large calls: tracing its loop gains nothing
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
        mass: [H, S] fp32, the soft span mask of each head.
        filled: [B], how many of the S earlier positions exist; None if all do.

    Returns:
        [H, B, M, D].
    """
    with torch.autocast("cpu", enabled=False):  # under autocast, softmax would read and return fp32
        out: Tensor = _TiledAttention.apply(  # type: ignore[no-untyped-call]
            filled, dropout, query, key, value, persistent.key, persistent.value, position, mass
        )
    return out


class _Inputs(NamedTuple):
    """The tensors that `tiled_attention` reads, or the gradients of these tensors."""

    query: Tensor  # [H, B, M, D]
    key: Tensor  # [H, B, S + M, D]
    value: Tensor
    persistent_key: Tensor  # [H, N, D]
    persistent_value: Tensor
    position: Tensor  # [D, S]
    mass: Tensor  # [H, S]

    def zeros(self) -> "_Inputs":
        """Zero gradients; a gradient that sums over many tiles is kept in fp32 at least."""
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
            probabilities, dropout_mask = work.probabilities(tile, filled=filled, dropout=dropout)
            kept += [probabilities] if dropout_mask is None else [probabilities, dropout_mask]
            dropped = probabilities if dropout_mask is None else probabilities * dropout_mask
            out[tile.head, tile.streams, tile.tokens] = work.values(tile, dropped)
        ctx.save_for_backward(*inputs, *kept)
        ctx.has_dropout = dropout > 0
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        count, saved = len(_Inputs._fields), ctx.saved_tensors
        inputs, kept = _Inputs(*saved[:count]), iter(saved[count:])
        gradients = inputs.zeros()
        with torch.autocast("cpu", enabled=False):
            work = _Pass(inputs)
            for tile in work.tiles():
                probabilities, dropout_mask = next(kept), next(kept) if ctx.has_dropout else None
                work.differentiate(tile, probabilities, dropout_mask, grad_output=grad_output, gradients=gradients)
        gradients.mass.div_(inputs.mass.clamp(min=FLOOR))
        return None, None, *(gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, inputs, strict=True))


class _Tile(NamedTuple):
    """The part of the attention that is computed at once: some streams and tokens of one head."""

    head: int
    streams: slice
    tokens: slice  # of the block
    window: slice  # of the keys and values: all positions that these tokens attend to


class _Pass:
    """The work on each tile of a forward or backward pass. Scores are [b T, S + N], a row for each token of a tile."""

    def __init__(self, inputs: _Inputs) -> None:
        self._inputs = inputs
        self._num_slots = inputs.position.shape[1]
        self._num_columns = self._num_slots + inputs.persistent_key.shape[1]
        self._log_mass = inputs.mass.clamp(min=FLOOR).log().to(inputs.query.dtype)
        self._scratch = _Scratch(inputs.query, num_slots=self._num_slots, num_columns=self._num_columns)

    def tiles(self) -> Iterator[_Tile]:
        heads, streams, num_new, _ = self._inputs.query.shape
        tokens = min(TILE_TOKENS, num_new)
        num_streams = max(1, TILE_BYTES // (tokens * self._num_columns * self._inputs.query.element_size()))
        for head in range(heads):
            for start in range(0, num_new, tokens):
                stop = min(start + tokens, num_new)
                for first in range(0, streams, num_streams):
                    some_streams = slice(first, min(first + num_streams, streams))
                    yield _Tile(head, some_streams, slice(start, stop), slice(start, self._num_slots + stop))

    def probabilities(self, tile: _Tile, *, filled: Tensor | None, dropout: float) -> tuple[Tensor, Tensor | None]:
        """The probability of each distance and persistent vector, and the dropout mask or None; both [b T, S + N]."""
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
        dropout_mask = torch.empty_like(scores).bernoulli_(1 - dropout).div_(1 - dropout) if dropout else None
        return torch.softmax(scores, -1), dropout_mask

    def values(self, tile: _Tile, probabilities: Tensor) -> Tensor:
        """The output: the values weighted by their probabilities, [b, T, D]."""
        head, inputs = tile.head, self._inputs
        by_distance, shared = probabilities[:, : self._num_slots], probabilities[:, self._num_slots :]
        spread = self._scratch.spread(by_distance, like=inputs.query[head, tile.streams, tile.tokens])
        mean = torch.bmm(spread, inputs.value[head, tile.streams, tile.window])
        mean.view(len(shared), -1).addmm_(shared, inputs.persistent_value[head])
        return mean

    def differentiate(
        self,
        tile: _Tile,
        probabilities: Tensor,
        dropout_mask: Tensor | None,
        *,
        grad_output: Tensor,
        gradients: _Inputs,
    ) -> None:
        """Add the gradients from one tile to `gradients`; the caller divides the gradient of `mass` by `mass`."""
        inputs, num_slots, head = self._inputs, self._num_slots, tile.head
        tokens, window = (head, tile.streams, tile.tokens), (head, tile.streams, tile.window)
        query, out = inputs.query[tokens], grad_output[tokens]  # [b, T, D]
        flat, flat_out = query.reshape(-1, query.shape[-1]), out.reshape(-1, out.shape[-1])
        dropped = probabilities if dropout_mask is None else probabilities * dropout_mask
        gradients.value[window].add_(torch.bmm(self._scratch.spread(dropped[:, :num_slots], like=query).mT, out))
        gradients.persistent_value[head].add_(dropped[:, num_slots:].mT @ flat_out)

        grad_probabilities = self._scratch.columns(len(flat))
        self._scratch.products_by_distance(out, inputs.value[window], out=grad_probabilities[:, :num_slots])
        torch.mm(flat_out, inputs.persistent_value[head].mT, out=grad_probabilities[:, num_slots:])
        if dropout_mask is not None:
            grad_probabilities.mul_(dropout_mask)
        grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
        by_distance, shared = grad_scores[:, :num_slots], grad_scores[:, num_slots:]

        gradients.mass[head].add_(by_distance.sum(0, dtype=gradients.mass.dtype))
        gradients.position.add_(flat.mT @ by_distance)
        gradients.persistent_key[head].add_(shared.mT @ flat)
        spread = self._scratch.spread(by_distance, like=query)
        gradients.key[window].add_(torch.bmm(spread.mT, query))
        part = torch.bmm(spread, inputs.key[window])
        part.view_as(flat).addmm_(by_distance, inputs.position.mT).addmm_(shared, inputs.persistent_key[head])
        gradients.query[tokens] = part


class _Scratch:
    """Scratch memory for all tiles of a pass, and the copies between columns by key and columns by distance.

    Row t by distance, [b T, S], is row t by key, [b, T, S + T], from column t on.
    """

    def __init__(self, query: Tensor, *, num_slots: int, num_columns: int) -> None:
        self._num_slots, self._num_columns = num_slots, num_columns
        self._columns = self._products = self._spread = query.new_empty(0)

    def columns(self, rows: int) -> Tensor:
        """Uninitialised memory [rows, S + N]; valid until the next call."""
        if len(self._columns) < rows:
            self._columns = self._columns.new_empty(rows, self._num_columns)
        return self._columns[:rows]

    def products_by_distance(self, left: Tensor, right: Tensor, *, out: Tensor) -> None:
        """Write to `out` [b T, S] the products of each row of `left` [b, T, D] with the S rows of `right` before it.

        right: [b, S + T, D].
        """
        shape = (*left.shape[:2], right.shape[1])
        if self._products.shape != shape:
            self._products = left.new_empty(shape)
        torch.bmm(left, right.mT, out=self._products)
        out.view(*shape[:2], -1).copy_(self._by_distance(self._products))

    def spread(self, by_distance: Tensor, *, like: Tensor) -> Tensor:
        """Columns by distance [b T, S] as columns by key [b, T, S + T], zero elsewhere; valid until the next call.

        like: [b, T, D], which gives b and T.
        """
        shape = (*like.shape[:2], self._num_slots + like.shape[1])
        if self._spread.shape != shape:
            self._spread = by_distance.new_zeros(shape)  # nothing is ever written outside the band
        self._by_distance(self._spread).copy_(by_distance.view(*shape[:2], -1))
        return self._spread

    def _by_distance(self, by_key: Tensor) -> Tensor:
        streams, tokens, width = by_key.shape
        return by_key.as_strided((streams, tokens, self._num_slots), (tokens * width, width + 1, 1))


def _mask_empty(by_distance: Tensor, filled: Tensor) -> None:
    """Set the scores of positions before a stream began to -inf, in place.

    by_distance: [b, T, S]; filled: [b], how many positions exist before the first token of the tile.
    """
    _, tokens, num_slots = by_distance.shape
    if int(filled.min()) >= num_slots:
        return
    key_index = torch.arange(tokens)[:, None] + torch.arange(num_slots)  # [T, S], index of the key
    by_distance.masked_fill_(key_index < num_slots - filled[:, None, None], -math.inf)

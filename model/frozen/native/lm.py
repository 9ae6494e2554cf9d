"""A frozen model on a CPU that the native step computes: a `ServedLM` that uses no operators of torch.

The model alone fixes the order of every sum. So a row has the same bits alone and in any batch, in one chunk and token
by token, with any number of threads, wherever its rings begin, and with every variant.

Sizes: B rows, T new tokens, E width, H heads, D head size, V vocabulary, V' = V rounded up to 16.
"""

import ctypes
import math
import os
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.backends import AUTO, LoadOptions
from model.bundle import Bundle
from model.config import ModelConfig
from model.frozen.native.build import NativeError
from model.frozen.native.cache import NativeCache
from model.frozen.native.folding import BLOCK, clusters, fold, reaches, ring_slots
from model.frozen.native.library import (
    DRAW,
    PARTS,
    VARIANTS,
    WEIGHTS,
    Shape,
    check_choice,
    choose_variant,
    load_library,
)

RINGS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_THREADS = 256
SCORED_AT_ONCE = 2**20  # number of logits in memory while tokens are scored: 4 MB
UNSHARED = 2  # sys.getrefcount of an array that only one attribute refers to


class DecodedAndDrawn(NamedTuple):
    """The results of one step of B rows."""

    tokens: NDArray[np.int64]  # [B]
    logprobs: NDArray[np.float32]  # [B], at temperature 1; NaN if the row's logits are not finite
    logits: Tensor  # [B, V]
    new: list[Tensor]  # new keys and values of each layer [B, 1, 2, H, D]; empty if committed


class NativeLM:
    """A frozen all-attention language model that the native step computes."""

    backend = "native"
    invariant_rows = 1
    device = torch.device("cpu")

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, NDArray[np.float32]],
        *,
        weights: str = "float32",
        rings: str | None = None,
        variant: str = "auto",
        num_threads: int | None = None,
    ) -> None:
        """Quantise and lay out the weights of a bundle.

        Args:
            tensors: named and shaped as `config.tensor_shapes()`, float32.
            weights: float32, bfloat16, int8 or int4.
            rings: float32 or bfloat16; None = float32 with float32 weights, else bfloat16.
            variant: the instructions of the kernels, one of `runnable_variants()`; auto = the fastest.
            num_threads: None = the number of cores.

        Raises:
            NativeError: the library cannot be built or loaded, a choice is unknown, or the model's sizes do not fit.
        """
        self.config, self.weights = config, weights
        rings = rings or ("float32" if weights == "float32" else "bfloat16")
        check_choice(rings, what="rings", allowed=tuple(RINGS))
        kind = check_choice(weights, what="weights", allowed=WEIGHTS)
        self.dtype = RINGS[rings]
        self.variant = choose_variant(variant)
        self.num_threads = num_threads or len(os.sched_getaffinity(0))
        _check_sizes(config, num_threads=self.num_threads)
        self.spans = reaches(config, tensors)
        shape = Shape(
            config.num_layers,
            config.width,
            config.num_heads,
            config.head_size,
            config.num_persistent,
            config.vocab_size,
            kind,
            WEIGHTS.index(rings),
            WEIGHTS.index("int8" if weights == "int4" else weights),  # of the output layer, where int4 loses too much
            int(config.empty_slots == "masked"),
            len(clusters(config)),
            self.num_threads,
            VARIANTS.index(self.variant),
        )
        self._library, self._lock, self._reserved = load_library(), threading.Lock(), 0
        self._handle, self._pairs = self._open(shape), np.empty(0, np.float32)
        weakref.finalize(self, self._library.allattn_close, self._handle)
        for part, layer, place, values in fold(config, tensors):
            array = np.ascontiguousarray(values, np.float32)
            self._library.allattn_set(self._handle, PARTS.index(part), layer, place, array.ctypes.data)
        self.row_bytes = int(self._library.allattn_row_bytes(self._handle))
        self.weight_bytes = int(self._library.allattn_weight_bytes(self._handle))
        self._padded_vocab = -(-config.vocab_size // BLOCK) * BLOCK

    def _open(self, shape: Shape) -> int:
        slots = ring_slots(self.spans)
        parts = clusters(self.config)
        sizes = np.array([part.high - part.low for part in parts], np.int32)
        widths = np.array([part.width for part in parts], np.int32)
        arrays = (slots.ctypes.data, sizes.ctypes.data, widths.ctypes.data)
        handle = self._library.allattn_open(ctypes.byref(shape), *arrays)
        if not handle:
            raise NativeError(f"the native step cannot get memory and {self.num_threads} threads for this model")
        return int(handle)

    def allocate(self, num_rows: int) -> NativeCache:
        """Return empty rings for `num_rows` streams."""
        return NativeCache(num_rows=num_rows, row_bytes=self.row_bytes, commit=self.commit)

    def decode(self, tokens: Tensor, cache: NativeCache) -> tuple[Tensor, list[Tensor]]:
        """Return logits [B, V] fp32 after one new token [B] of each first row, and pairs [B, 1, 2, H, D] by layer.

        Raises:
            NativeError: a token is not in the vocabulary.
        """
        fed = tokens.to(torch.int64).contiguous().numpy()
        fresh = self._new_pairs(len(fed), 1)
        logits = self._decode(fed, cache, np.arange(len(fed)), fresh=fresh)
        return logits, list(fresh.unbind(0))

    def decode_and_draw(
        self,
        tokens: NDArray[np.int64],
        cache: NativeCache,
        *,
        rows: NDArray[np.int64],
        draws: NDArray[np.void],
        commit: bool = True,
    ) -> DecodedAndDrawn:
        """Feed one token to each of some rows and draw their next tokens, in one call.

        At temperature 0 the drawn token has the largest logit (the first of equals); at other temperatures
        `model.sampling.draw.uniform_noise` says which noise draws it. There are no penalties and filters here.

        Args:
            tokens: [B]; rows: [B], all different.
            draws: [B] of dtype `DRAW`; `position` is the number of tokens before the drawn token.
            commit: write the new keys and values into the rings; if not, the result has them for `NativeCache.commit`.

        Raises:
            NativeError: a token is not in the vocabulary; then nothing has changed.
        """
        fresh = None if commit else self._new_pairs(len(tokens), 1)
        drawn, logprobs = np.empty(len(tokens), np.int64), np.empty(len(tokens), np.float32)
        wanted = np.ascontiguousarray(draws, DRAW)
        logits = self._decode(tokens, cache, rows, fresh=fresh, draws=wanted, out=(drawn, logprobs))
        return DecodedAndDrawn(drawn, logprobs, logits, [] if fresh is None else list(fresh.unbind(0)))

    def draw(self, logits: Tensor, draws: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return tokens [n] drawn from logits [n, V], as `decode_and_draw` draws, and their log-probabilities [n]."""
        padded = torch.full((len(logits), self._padded_vocab), -math.inf)
        padded[:, : self.config.vocab_size] = logits
        wanted = np.ascontiguousarray(draws, DRAW)
        drawn, logprobs = np.empty(len(logits), np.int64), np.empty(len(logits), np.float32)
        with self._lock:
            self._reserve(len(logits))
            self._library.allattn_draw(
                self._handle,
                padded.data_ptr(),
                len(logits),
                wanted.ctypes.data,
                drawn.ctypes.data,
                logprobs.ctypes.data,
            )
        return drawn, logprobs

    def _decode(
        self,
        tokens: NDArray[np.int64],
        cache: NativeCache,
        rows: NDArray[np.int64],
        *,
        fresh: Tensor | None = None,
        draws: NDArray[np.void] | None = None,
        out: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None,
    ) -> Tensor:
        logits = torch.empty(len(tokens), self._padded_vocab)
        with self._lock:
            self._reserve(len(tokens))
            wrong = self._library.allattn_decode(
                self._handle,
                cache.rings.data_ptr(),
                cache.lengths.ctypes.data,
                rows.ctypes.data,
                tokens.ctypes.data,
                len(tokens),
                logits.data_ptr(),
                None if fresh is None else fresh.data_ptr(),
                None if draws is None else draws.ctypes.data,
                None if out is None else out[0].ctypes.data,
                None if out is None else out[1].ctypes.data,
                fresh is None,
            )
        self._check(wrong, tokens)
        return logits[:, : self.config.vocab_size]

    def extend(self, tokens: Tensor, cache: NativeCache, rows: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Return hidden states [B, T, E] of new tokens [B, T] of some rows, and pairs [B, T, 2, H, D] by layer.

        Raises:
            NativeError: a token is not in the vocabulary.
        """
        return self._extend(tokens, cache, rows, None)

    def extend_with_memory_share(
        self, tokens: Tensor, cache: NativeCache, rows: Sequence[int]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Do `extend`; also return the heads' mean share of attention on persistent vectors, [B, T, layers] fp32."""
        by_head = torch.empty(*tokens.shape, self.config.num_layers, self.config.num_heads)
        hidden, new = self._extend(tokens, cache, rows, by_head)
        return hidden, new, by_head.double().sum(-1).div(self.config.num_heads).float()

    def _extend(
        self, tokens: Tensor, cache: NativeCache, rows: Sequence[int], shares: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        lines = tokens.to(torch.int64).contiguous()
        num_rows, num_new = lines.shape
        fresh = self._new_pairs(num_rows, num_new)
        hidden = torch.empty(num_rows, num_new, self.config.width)
        with self._lock:
            self._reserve(num_new)
            for i, row in enumerate(rows):
                wrong = self._library.allattn_extend(
                    self._handle,
                    cache.rings[row].data_ptr(),
                    int(cache.lengths[row]),
                    lines[i].data_ptr(),
                    num_new,
                    hidden[i].data_ptr(),
                    fresh[0, i].data_ptr(),
                    num_rows * num_new,
                    None if shares is None else shares[i].data_ptr(),
                )
                self._check(wrong, lines[i].numpy())
        return hidden, list(fresh.unbind(0))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [n, V] fp32 of hidden states [n, E]; adaptive embeddings give log-probabilities."""
        lines = hidden.reshape(-1, self.config.width).to(torch.float32).contiguous()
        found = torch.empty(len(lines), self._padded_vocab)
        with self._lock:
            self._reserve(len(lines))
            self._library.allattn_logits(self._handle, lines.data_ptr(), len(lines), found.data_ptr())
        return found[:, : self.config.vocab_size].view(*hidden.shape[:-1], -1)

    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (nats, fp32) and ranks (int64, 0 = the most probable) of targets, each [n].

        Args:
            hidden: [n, E]; targets: [n] int64.

        Raises:
            NativeError: a target is not in the vocabulary.
        """
        lines, wanted = hidden.to(torch.float32).contiguous(), targets.to(torch.int64).contiguous()
        logprobs, ranks = torch.empty(len(wanted)), torch.empty(len(wanted), dtype=torch.int64)
        step = max(BLOCK, SCORED_AT_ONCE // self._padded_vocab)
        with self._lock:
            self._reserve(min(step, len(wanted)))
            scratch = torch.empty(min(step, len(wanted)), self._padded_vocab)
            for start in range(0, len(wanted), step):
                wrong = self._library.allattn_score(
                    self._handle,
                    lines[start:].data_ptr(),
                    min(step, len(wanted) - start),
                    wanted[start:].data_ptr(),
                    scratch.data_ptr(),
                    logprobs[start:].data_ptr(),
                    ranks[start:].data_ptr(),
                )
                self._check(wrong, wanted[start:].numpy())
        return logprobs, ranks

    def commit(self, cache: NativeCache, rows: Sequence[int], new: Sequence[Tensor], num_new: Sequence[int]) -> None:
        """Write keys and values into a cache, as `NativeCache.commit` describes."""
        num_rows, num_tokens = new[0].shape[:2]
        layer_bytes = new[0].nbytes
        together = all(layer.data_ptr() == new[0].data_ptr() + i * layer_bytes for i, layer in enumerate(new))
        fresh = new[0] if together and new[0].is_contiguous() else torch.stack(list(new)).float()
        first, token_bytes = fresh.data_ptr(), new[0][0].nbytes
        with self._lock:
            for i, (row, count) in enumerate(zip(rows, num_new, strict=True)):
                if count:
                    self._library.allattn_commit(
                        self._handle,
                        cache.rings[row].data_ptr(),
                        int(cache.lengths[row]),
                        first + i * token_bytes,
                        num_rows * num_tokens,
                        count,
                    )
                    cache.lengths[row] += count

    def _new_pairs(self, num_rows: int, num_new: int) -> Tensor:
        """Return memory for keys and values. Free memory of the last call is used again: new pages cost much time."""
        config = self.config
        shape = (config.num_layers, num_rows, num_new, 2, config.num_heads, config.head_size)
        size = math.prod(shape)
        if self._pairs.size < size or sys.getrefcount(self._pairs) > UNSHARED:
            self._pairs = np.empty(size, np.float32)
        return torch.from_numpy(self._pairs)[:size].view(shape)

    def _reserve(self, tokens: int) -> None:
        if tokens > self._reserved:
            if self._library.allattn_reserve(self._handle, tokens):
                raise NativeError(f"the native step cannot get memory for {tokens} tokens at once")
            self._reserved = tokens

    def _check(self, wrong: int, tokens: NDArray[np.int64]) -> None:
        if wrong:
            raise NativeError(
                f"token {tokens[wrong - 1]} is not in the vocabulary; allowed: 0 .. {self.config.vocab_size - 1}"
            )


def load_native(bundle: Bundle, options: LoadOptions) -> NativeLM:
    """Return the model of a bundle for the native step.

    Raises:
        BundleError: as for `Bundle.tensors`.
        NativeError: the library cannot be built or loaded, or the options or the model's sizes are not supported.
    """
    if options.device == "cuda":
        raise NativeError("device = 'cuda', but the native backend computes on the CPU; allowed: auto, cpu")
    return NativeLM(
        bundle.config,
        bundle.tensors(),
        weights=options.dtype if options.weights == AUTO else options.weights,
        rings=options.dtype,
        variant=options.native_variant,
        num_threads=options.num_threads,
    )


def _check_sizes(config: ModelConfig, *, num_threads: int) -> None:
    if config.width % BLOCK:
        raise NativeError(f"width {config.width} is not supported by the native step; allowed: multiples of {BLOCK}")
    if not 1 <= num_threads <= MAX_THREADS:
        raise NativeError(f"num_threads {num_threads} is outside of what the native step supports: 1 .. {MAX_THREADS}")

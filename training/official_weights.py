"""Conversion of the weights of a checkpoint of the paper's code to our configuration and weights.

The names and shapes are facts of github.com/facebookresearch/adaptive-span (models.py names the modules). Its layout
differs from ours in three points: positions are stored farthest first, persistent keys are columns, and the spans are
stored a second time under the persistent memory. Adaptive embeddings have the layout of model/adaptive.py. Knows no
file and no vocabulary.

Sizes: L maximum span, V symbols, H heads, D head size, E = H D width, N persistent vectors, n_i words of cluster i.
"""

import re

import torch
from torch import Tensor

from model.config import ModelConfig
from training.official_checkpoint import OfficialCheckpointError

_ATTENTION = "layers.{}.attn."
_PERSISTENT = "attn.persistent_memory."
_SPAN = "adaptive_span._mask."


def convert(
    state: dict[str, Tensor], *, span_ramp: int = 32, dropout: float = 0.0, embedding_dropout: float = 0.0
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Our configuration for the official vocabulary, and float32 weights named as in `ModelConfig.tensor_shapes`.

    Args:
        state: the weights that `read_checkpoint` returns.
        span_ramp, dropout, embedding_dropout: settings that no tensor determines.

    Raises:
        OfficialCheckpointError: a tensor is missing, unexpected, not finite or has a wrong shape, or the checkpoint is
            of another kind of model.
    """
    weights = _State(state)
    weights.refuse_other_models()
    head, max_span = weights.shape("key_pe", "1, D, L")[1:]
    heads, _, pairs = weights.shape(_ATTENTION.format(0) + _PERSISTENT + "key", "H, D, N")
    width = heads * head
    tensors, cutoffs, div = _adaptive(weights, width) if weights.is_adaptive else _plain(weights, width)
    tensors["position"] = weights.take("key_pe", 1, head, max_span)[0].flip(-1)
    num_layers = 1 + max(int(name.split(".")[1]) for name in state if re.match(r"layers\.\d+\.", name))
    for i in range(num_layers):
        layer = _layer(weights, i, heads=heads, head=head, pairs=pairs, max_span=max_span)
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in layer.items()}
    weights.refuse_the_rest()
    config = ModelConfig(
        num_layers=num_layers,
        width=width,
        num_heads=heads,
        num_persistent=pairs,
        max_span=max_span,
        span_ramp=span_ramp,
        dropout=dropout,
        embedding_dropout=embedding_dropout,
        embedding="adaptive" if cutoffs else "plain",
        adaptive_cutoffs=cutoffs,
        adaptive_div=div,
        empty_slots="zero",
        vocab_size=sum(len(tensor) for name, tensor in tensors.items() if name.startswith("output.bias")),
    )
    return config, tensors


class _State:
    """The official tensors not yet converted. `take` removes a tensor; a tensor that remains at the end is an error."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._remaining = dict(tensors)

    @property
    def is_adaptive(self) -> bool:
        return "in_emb.weight" not in self._remaining and "in_emb.emb_layers.0.weight" in self._remaining

    def __contains__(self, key: str) -> bool:
        return key in self._remaining

    def shape(self, key: str, letters: str) -> torch.Size:
        """The shape of a tensor that determines sizes: as many dimensions as `letters` names, none of them 0."""
        if key not in self._remaining:
            raise OfficialCheckpointError(f"the checkpoint lacks {key}, which every all-attention model has")
        shape = self._remaining[key].shape
        if len(shape) != len(letters.split(",")) or not all(shape):
            raise OfficialCheckpointError(f"{key} has shape {list(shape)}; it must be [{letters}]")
        return shape

    def take(self, key: str, *shape: int) -> Tensor:
        """Remove the tensor `key` and return it in float32; it must have the given shape."""
        if key not in self._remaining:
            raise OfficialCheckpointError(f"the checkpoint lacks {key} of shape {list(shape)}")
        tensor = self._remaining.pop(key)
        if tensor.shape != shape:
            raise OfficialCheckpointError(
                f"{key} has shape {list(tensor.shape)}; beside the others it must be {list(shape)}"
            )
        if not tensor.isfinite().all():
            raise OfficialCheckpointError(f"{key} holds values that are not finite")
        return tensor.float()

    def refuse_other_models(self) -> None:
        """Raise an error for layers with feed-forward parts, which the same code can also train."""
        for key in self._remaining:
            if re.match(r"layers\.\d+\.(ff|norm2)\.", key):
                raise OfficialCheckpointError(
                    f"{key}: this model has feed-forward layers; only all-attention models, trained with "
                    "--pers-mem-size and without them, can be imported"
                )

    def refuse_the_rest(self) -> None:
        if self._remaining:
            names = ", ".join(sorted(self._remaining)[:5])
            raise OfficialCheckpointError(f"unexpected {names}: no part of an all-attention model of the paper's code")


def _plain(weights: _State, width: int) -> tuple[dict[str, Tensor], tuple[int, ...], int]:
    num_symbols, _ = weights.shape("in_emb.weight", "V, E")
    if num_symbols < 2:
        raise OfficialCheckpointError("in_emb.weight has 1 row; a vocabulary has 2 symbols or more")
    tensors = {
        "embedding.weight": weights.take("in_emb.weight", num_symbols, width),
        "output.weight": weights.take("out_emb.weight", num_symbols, width),
        "output.bias": weights.take("out_emb.bias", num_symbols),
    }
    return tensors, (), 4


def _adaptive(weights: _State, width: int) -> tuple[dict[str, Tensor], tuple[int, ...], int]:
    """The weights of the adaptive embedding and output, the cutoffs and the division value."""
    num_clusters = 0
    shapes = []
    while (key := f"in_emb.emb_layers.{num_clusters}.weight") in weights:
        shapes.append(tuple(weights.shape(key, "n_i, E / div^i")))
        num_clusters += 1
    div = _division(shapes, width=width)
    tensors = {}
    for i, (num_words, narrow) in enumerate(shapes):
        table = weights.take(f"in_emb.emb_layers.{i}.weight", num_words, narrow)
        if not table.equal(weights.take(f"out_emb.out_layers.{i}.weight", num_words, narrow)):
            raise OfficialCheckpointError(
                f"out_emb.out_layers.{i}.weight differs from in_emb.emb_layers.{i}.weight: only models trained with "
                "--adapt-io-tied can be imported, whose tables are the same"
            )
        tensors[f"embedding.tables.{i}.weight"] = table
        tensors[f"embedding.projections.{i}.weight"] = weights.take(f"in_emb.emb_projs.{i}", width, narrow)
        tensors[f"output.projections.{i}.weight"] = weights.take(f"out_emb.out_projs.{i}", width, narrow)
        tensors[f"output.biases.{i}"] = weights.take(f"out_emb.out_layers.{i}.bias", num_words)
    tensors["output.cluster.weight"] = weights.take("out_emb.cluster_proj.weight", num_clusters - 1, width)
    tensors["output.cluster.bias"] = weights.take("out_emb.cluster_proj.bias", num_clusters - 1)
    cutoffs = tuple(sum(num_words for num_words, _ in shapes[: i + 1]) for i in range(num_clusters - 1))
    return tensors, cutoffs, div


def _division(shapes: list[tuple[int, ...]], *, width: int) -> int:
    """The division value: the number by which the width of each further cluster is divided."""
    for div in range(2, width + 1):
        if len(shapes) > 1 and all(shape[1] == width // div**i for i, shape in enumerate(shapes)):
            return div
    raise OfficialCheckpointError(
        f"in_emb.emb_layers are {', '.join(str(shape[1]) for shape in shapes)} wide; there must be two or more, the "
        f"first as wide as the model, {width}, and each further one narrower by the same whole number"
    )


def _layer(weights: _State, i: int, *, heads: int, head: int, pairs: int, max_span: int) -> dict[str, Tensor]:
    width, attention = heads * head, _ATTENTION.format(i)
    ours = {"query": "query", "key": "key", "value": "val", "out": "out"}
    tensors = {
        f"{name}.weight": weights.take(f"{attention}proj_{theirs}.weight", width, width)
        for name, theirs in ours.items()
    }
    tensors["persistent_key"] = weights.take(attention + _PERSISTENT + "key", heads, head, pairs).mT
    tensors["persistent_value"] = weights.take(attention + _PERSISTENT + "val", heads, pairs, head)
    tensors["span"] = _spans(weights, attention, heads=heads, max_span=max_span)
    tensors["norm.weight"] = weights.take(f"layers.{i}.norm1.weight", width)
    tensors["norm.bias"] = weights.take(f"layers.{i}.norm1.bias", width)
    return tensors


def _spans(weights: _State, attention: str, *, heads: int, max_span: int) -> Tensor:
    """z of each head [H]; 1 (no distance up to L is masked) if the model was trained without spans."""
    key = f"{attention}attn.{_SPAN}"
    if key + "current_val" not in weights:
        return torch.ones(heads)
    z = weights.take(key + "current_val", heads, 1, 1)
    if z.min() < 0 or z.max() > 1:
        raise OfficialCheckpointError(f"{key}current_val is from {z.min():g} to {z.max():g}; spans are from 0 to 1")
    _check_ramp(weights, key + "mask_template", max_span=max_span)
    second = attention + _PERSISTENT + _SPAN
    if second + "current_val" in weights:
        if not z.equal(weights.take(second + "current_val", heads, 1, 1)):
            raise OfficialCheckpointError(f"{second}current_val differs from {key}current_val; they are one tensor")
        _check_ramp(weights, second + "mask_template", max_span=max_span)
    return z.flatten()


def _check_ramp(weights: _State, key: str, *, max_span: int) -> None:
    """Check a constant that is saved with the weights: 1 - d for each distance d, farthest first."""
    rounding = 1e-2  # relative error of a checkpoint in half precision
    if not weights.take(key, max_span).allclose(torch.arange(1.0 - max_span, 1.0), rtol=rounding):
        raise OfficialCheckpointError(f"{key} is not 1 - L .. 0: this model masks its spans in another way")

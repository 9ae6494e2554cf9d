"""Converts trained weights for the native step: scalings are folded in, tables are in the order of time.

Sizes: E width, H heads, D head size, S slots of a head's ring, N persistent vectors, L maximum span, K clusters.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from model.adaptive import Cluster, clusters_of
from model.config import ModelConfig
from model.spans import reach_of_heads, span_mask

Array = NDArray[np.float32]
BLOCK = 16  # slots in a block; a ring has whole blocks


class Folded(NamedTuple):
    """The weights of one part of the model, as `allattn_set` takes them."""

    part: str
    layer: int
    place: int  # number of the head or cluster
    values: Array


def clusters(config: ModelConfig) -> list[Cluster]:
    """Return the clusters of the vocabulary; plain embeddings have one cluster with all tokens."""
    return clusters_of(config) if config.embedding == "adaptive" else [Cluster(0, config.vocab_size, config.width)]


def reaches(config: ModelConfig, tensors: Mapping[str, Array]) -> list[list[int]]:
    """Return the reach of each head, in tokens, by layer."""
    spans = (tensors[f"layers.{layer}.span"] for layer in range(config.num_layers))
    return [reach_of_heads(span.tolist(), config=config) for span in spans]


def ring_slots(spans: list[list[int]]) -> NDArray[np.int32]:
    """Return the ring size of each head, [layers, H]: its reach, rounded up to whole blocks."""
    return -(-np.array(spans, np.int32) // BLOCK) * BLOCK


def fold(config: ModelConfig, tensors: Mapping[str, Array]) -> Iterator[Folded]:
    """Yield all parts of a model, made from its weights by name."""
    slots = ring_slots(reaches(config, tensors))
    position = np.zeros((config.head_size, int(slots.max())), np.float32)
    reached = min(position.shape[1], config.max_span)
    position[:, :reached] = tensors["position"][:, :reached]
    yield Folded("position", 0, 0, position[:, ::-1])
    yield from _plain_embeddings(tensors) if config.embedding == "plain" else _clusters(config, tensors)
    for layer in range(config.num_layers):
        own = {name.split(".", 2)[2]: array for name, array in tensors.items() if name.startswith(f"layers.{layer}.")}
        yield from _layer(config, layer, own, slots[layer].tolist())


def _layer(config: ModelConfig, layer: int, own: Mapping[str, Array], slots: list[int]) -> Iterator[Folded]:
    heads, head = config.num_heads, config.head_size
    scale = np.float32(math.sqrt(head))
    query, key, value = (own[f"{name}.weight"].reshape(heads, head, -1) for name in ("query", "key", "value"))
    for index in range(heads):
        joined = np.concatenate((query[index] / scale, key[index], value[index]))  # [3 D, E]
        yield Folded("query_key_value", layer, index, joined.T)
        yield Folded("persistent_key", layer, index, (own["persistent_key"][index] * scale).T)
        values = own["persistent_value"][index] * np.float32(math.sqrt(config.num_persistent))
        yield Folded("persistent_value", layer, index, values)
        yield Folded("log_mass", layer, index, _log_mass(config, own["span"][index], slots[index]))
    yield Folded("out", layer, 0, own["out.weight"].T)
    yield Folded("norm_weight", layer, 0, own["norm.weight"])
    yield Folded("norm_bias", layer, 0, own["norm.bias"])


def _log_mass(config: ModelConfig, span: np.float32, num_slots: int) -> Array:
    """Return the logarithm of a head's soft mask, [S], farthest distance first."""
    mask = span_mask(torch.tensor([span]), num_slots=num_slots, config=config)[0].numpy().astype(np.float64)
    mask[config.max_span :] = 0  # whole blocks may reach beyond L, where there are no position vectors
    with np.errstate(divide="ignore"):
        return np.log(mask)[::-1].astype(np.float32)


def _plain_embeddings(tensors: Mapping[str, Array]) -> Iterator[Folded]:
    yield Folded("embedding", 0, 0, tensors["embedding.weight"])
    yield Folded("output", 0, 0, tensors["output.weight"].T)
    yield Folded("output_bias", 0, 0, tensors["output.bias"])


def _clusters(config: ModelConfig, tensors: Mapping[str, Array]) -> Iterator[Folded]:
    """Yield adaptive embeddings; the first output matrix has its projection and an entry for each other cluster."""
    scale = np.float32(math.sqrt(config.width))
    for i in range(len(clusters(config))):
        table, into = tensors[f"embedding.tables.{i}.weight"], tensors[f"embedding.projections.{i}.weight"]
        yield Folded("embedding", 0, i, table)
        yield Folded("into", 0, i, into.T * scale)
        projection, bias = tensors[f"output.projections.{i}.weight"], tensors[f"output.biases.{i}"]
        if i:
            yield Folded("narrow", 0, i, projection)
            yield Folded("tail", 0, i, table.T)
            yield Folded("tail_bias", 0, i, bias)
        else:
            rows = np.concatenate((table, tensors["output.cluster.weight"])).astype(np.float64)
            yield Folded("output", 0, 0, (projection.astype(np.float64) @ rows.T).astype(np.float32))
            yield Folded("output_bias", 0, 0, np.concatenate((bias, tensors["output.cluster.bias"])))

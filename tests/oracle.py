"""The equations of the all-attention model (arXiv 1907.01470; DESIGN.md section 1) as slow, plain loops in float64.

Every other path must agree with these results. Knows nothing of model/: it takes named weights and tokens.
The equations have two forms, written separately so that each checks the other:

- `logits`, `attention`: numpy, one probability at a time, whole streams that start fresh at token 0;
- `attend`: torch, one layer's attention from projected queries, keys and values, in the paper's literal order
  (softmax, mask, renormalise), so that autograd gives the gradients.

Shapes: T tokens, H heads, D head size, E = H * D width, N persistent vectors, L maximum span, V vocabulary, M queries.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]


def logits(
    weights: Mapping[str, npt.ArrayLike],
    tokens: Sequence[int],
    *,
    num_heads: int,
    max_span: int,
    span_ramp: int,
    empty_slots: str,
) -> Array:
    """Logits [T, V] of the next token after each of `tokens`; log-probabilities where embeddings are adaptive."""
    named = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    adaptive = "embedding.tables.0.weight" in named
    hidden = np.stack(
        [adaptive_input(named, t) if adaptive else named["embedding.weight"][t] for t in tokens]
    )  # [T, E]
    num_layers = 1 + max(int(name.split(".")[1]) for name in named if name.startswith("layers."))
    for i in range(num_layers):
        prefix = f"layers.{i}."
        layer = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
        out = attention(
            layer,
            hidden,
            named["position"],
            num_heads=num_heads,
            max_span=max_span,
            span_ramp=span_ramp,
            empty_slots=empty_slots,
        )
        hidden = np.stack([layer_norm(row, layer["norm.weight"], layer["norm.bias"]) for row in hidden + out])
    if adaptive:
        return np.stack([adaptive_logprobs(named, row) for row in hidden])
    return np.stack([named["output.weight"] @ row + named["output.bias"] for row in hidden])


def adaptive_input(named: Mapping[str, Array], token: int) -> Array:
    """Input vector [E] of a word: its vector in its cluster's table, projected, times sqrt(E)."""
    for table, projection in zip(
        _numbered(named, "embedding.tables.{}.weight"), _numbered(named, "embedding.projections.{}.weight"), strict=True
    ):
        if token < len(table):
            vector: Array = np.sqrt(len(projection)) * (projection @ table[token])
            return vector
        token -= len(table)
    raise AssertionError("no such word")


def adaptive_logprobs(named: Mapping[str, Array], row: Array) -> Array:
    """Log-probabilities [V] after a hidden state [E]; a later cluster multiplies its probability with that of the word.

    The head is a softmax over the words of the first cluster and the later clusters, of which the last comes first.
    """
    tables = _numbered(named, "embedding.tables.{}.weight")
    biases = _numbered(named, "output.biases.{}")
    narrow = [projection.T @ row for projection in _numbered(named, "output.projections.{}.weight")]
    words = [table @ state + bias for table, state, bias in zip(tables, narrow, biases, strict=True)]
    entries = named["output.cluster.weight"] @ narrow[0] + named["output.cluster.bias"]
    head = _softmax(np.concatenate([words[0], entries]))
    logprobs = list(np.log(head[: len(tables[0])]))
    for i in range(1, len(tables)):
        logprobs += list(np.log(head[len(head) - i] * _softmax(words[i])))
    return np.array(logprobs)


def _numbered(named: Mapping[str, Array], name: str) -> list[Array]:
    count = sum(key.startswith("embedding.tables.") for key in named)
    return [named[name.format(i)] for i in range(count)]


def _softmax(scores: Array) -> Array:
    weights: Array = np.exp(scores - scores.max())
    return weights / weights.sum()


def attention(
    layer: Mapping[str, Array],
    hidden: Array,
    position: Array,
    *,
    num_heads: int,
    max_span: int,
    span_ramp: int,
    empty_slots: str,
) -> Array:
    """Output [T, E] of one layer's attention over its inputs `hidden` [T, E], before the residual and the norm."""
    assert empty_slots in ("masked", "zero"), empty_slots
    num_tokens, width = hidden.shape
    size = width // num_heads
    out = np.zeros((num_tokens, width))
    for t in range(num_tokens):
        heads = np.zeros(width)
        for h in range(num_heads):
            rows = slice(h * size, (h + 1) * size)  # nn.Linear: these rows of a weight belong to this head
            query = layer["query.weight"][rows] @ hidden[t]
            scores, masks, values = [], [], []
            for d in range(1, max_span + 1):
                if d > t and empty_slots == "masked":
                    continue
                source = hidden[t - d] if d <= t else np.zeros(width)
                key = layer["key.weight"][rows] @ source
                scores.append(query @ (key + position[:, d - 1]) / np.sqrt(size))
                masks.append(span_mask(d, span=float(layer["span"][h]), max_span=max_span, span_ramp=span_ramp))
                values.append(layer["value.weight"][rows] @ source)
            num_pairs = layer["persistent_key"].shape[1]
            for n in range(num_pairs):
                scores.append(query @ (np.sqrt(size) * layer["persistent_key"][h, n]) / np.sqrt(size))
                masks.append(1.0)
                values.append(np.sqrt(num_pairs) * layer["persistent_value"][h, n])
            heads[rows] = masked_mean(scores, masks, values)
        out[t] = layer["out.weight"] @ heads
    return out


def span_mask(distance: int, *, span: float, max_span: int, span_ramp: int) -> float:
    """m(d): the soft mask of a head with learned span z at distance d >= 1."""
    return min(max((1 - distance + span * max_span) / span_ramp + 1, 0.0), 1.0)


def masked_mean(scores: Sequence[float], masks: Sequence[float], values: Sequence[Array]) -> Array:
    """Mean of `values`, weighted by the softmax of `scores` times `masks`, renormalised jointly."""
    top = max(score for score, mask in zip(scores, masks, strict=True) if mask > 0)
    weights = [mask * np.exp(score - top) if mask > 0 else 0.0 for score, mask in zip(scores, masks, strict=True)]
    total = sum(weights)
    mean = np.zeros_like(values[0])
    for weight, value in zip(weights, values, strict=True):
        mean += weight / total * value
    return mean


def layer_norm(row: Array, weight: Array, bias: Array) -> Array:
    """LayerNorm of one vector, with the biased variance and eps 1e-5."""
    centred = row - row.mean()
    normed: Array = centred / np.sqrt((centred**2).mean() + 1e-5) * weight + bias
    return normed


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    position: torch.Tensor,
    persistent_key: torch.Tensor,
    persistent_value: torch.Tensor,
    span: torch.Tensor,
    span_ramp: int,
    num_empty: int = 0,
) -> torch.Tensor:
    """The context of each head, [H, M, D], in the literal order of the paper, for autograd.

    Args:
        query: [H, M, D], the queries of M consecutive positions.
        key, value: [H, L + M, D], at the L positions before the first query and then at the positions of the queries.
        position: [D, L], column d - 1 for distance d.
        persistent_key, persistent_value: [H, N, D], the raw parameters.
        span: [H], z of each head.
        num_empty: how many of the first positions of `key` do not exist and take no probability.
    """
    num_heads, num_queries, size = query.shape
    max_span, num_pairs = position.shape[1], persistent_key.shape[1]
    heads = []
    for h in range(num_heads):
        rows = []
        for m in range(num_queries):
            distances = [d for d in range(1, max_span + 1) if max_span + m - d >= num_empty]
            slots = [max_span + m - d for d in distances]
            context = [query[h, m] @ (key[h, s] + position[:, d - 1]) for d, s in zip(distances, slots, strict=True)]
            memory = [query[h, m] @ (size**0.5 * persistent_key[h, n]) for n in range(num_pairs)]
            probabilities = torch.softmax(torch.stack(context + memory) / size**0.5, dim=0)
            ramps = [(1 - d + span[h] * max_span) / span_ramp + 1 for d in distances]
            masks = [torch.clamp(ramp, 0, 1) for ramp in ramps] + [torch.ones_like(span[h])] * num_pairs
            weights = probabilities * torch.stack(masks)
            weights = weights / (weights.sum() + 1e-8)
            values = [value[h, s] for s in slots] + [num_pairs**0.5 * persistent_value[h, n] for n in range(num_pairs)]
            rows.append(sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(query[h, m])))
        heads.append(torch.stack(rows))
    return torch.stack(heads)

"""Adaptive input and adaptive softmax with tied tables: for vocabularies of words, most of which are rare.

The words are sorted by frequency and cut into clusters. Cluster i has the words low_i .. high_i - 1, a table T_i of
their vectors (narrower for rarer words), and on each side a matrix between the cluster's width and the model's width:

    input   (Baevski and Auli 2019, arXiv 1809.10853):   x(w) = sqrt(E) P_i T_i[w - low_i]
    output  (Grave et al. 2017, arXiv 1609.04309), for a hidden state h:
            head   softmax over the words of cluster 0 and one entry for each further cluster:
                   T_0 (Q_0^T h) + b_0  and  c (Q_0^T h) + c_bias
            tail i softmax over the words of cluster i:  T_i (Q_i^T h) + b_i
            p(w) = head(w) in cluster 0, else head(entry of i) tail_i(w). The entry of cluster i is row C - i of c: the
                   rows are counted from the end, as in the authors' checkpoints.

P, T, Q, b, c are `embedding.projections`, `embedding.tables`, `output.projections`, `output.biases`, `output.cluster`.
torch.nn.AdaptiveLogSoftmaxWithLoss is this without b in the tails, without Q_0, and without a way to share T.

Sizes: E width, w_i width of cluster i, n_i words of cluster i, C clusters after cluster 0, V vocabulary, P positions.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.cross_entropy import summed_nats


class Cluster(NamedTuple):
    """A range of words of similar frequency, whose vectors have the same width."""

    low: int  # the first word of the cluster
    high: int  # the first word of the next cluster
    width: int  # size of the words' vectors


def clusters_of(config: ModelConfig) -> list[Cluster]:
    """The clusters of a vocabulary, the most frequent words first."""
    edges = pairwise((0, *config.adaptive_cutoffs, config.vocab_size))
    return [Cluster(low, high, config.width // config.adaptive_div**i) for i, (low, high) in enumerate(edges)]


class AdaptiveEmbedding(nn.Module):
    """The adaptive input embedding, initialised as in the official code: tables N(0, 1), projections as torch does."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        clusters = clusters_of(config)
        self.tables: list[nn.Embedding] = nn.ModuleList(  # type: ignore[assignment]
            nn.Embedding(high - low, width) for low, high, width in clusters
        )
        self.projections: list[nn.Linear] = _projections(clusters, config)
        self.scale = math.sqrt(config.width)

    @property
    def weights(self) -> list[Tensor]:
        """The tables [n_i, w_i], which the output layer shares."""
        return [table.weight for table in self.tables]

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens: [...] int64 -> [..., E]."""
        tables = self.weights
        joined = torch.cat([projection.weight for projection in self.projections], -1)  # [E, sum w]
        return F.linear(_look_up(tokens, tables), joined).to(tables[0].dtype) * self.scale


class AdaptiveOutput(nn.Module):
    """The adaptive softmax. Its methods take `tables`, the tables [n_i, w_i] of the input embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        clusters = clusters_of(config)
        self.clusters = clusters
        self.projections: list[nn.Linear] = _projections(clusters, config)
        self.biases: list[nn.Parameter] = nn.ParameterList(  # type: ignore[assignment]
            torch.empty(high - low).uniform_(-(width**-0.5), width**-0.5) for low, high, width in clusters
        )
        self.cluster = nn.Linear(config.width, len(clusters) - 1)

    def forward(self, hidden: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """Log-probabilities of the next token, [..., E] -> [..., V] fp32."""
        head = F.linear(self._narrow(hidden, 0), *self.head(tables)).float()
        tails = (
            F.linear(self._narrow(hidden, i), tables[i], self.biases[i]).float() for i in range(1, len(self.clusters))
        )
        return join_clusters(head, tails, sizes=[high - low for low, high, _ in self.clusters])

    def loss(self, hidden: Tensor, tables: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Summed cross-entropy, in nats, of the next tokens `targets` [P] given hidden states [P, E]: a scalar, fp32.

        Each tail is computed only at the positions whose target is in it; no tensor holds the scores of all words.
        """
        first = self.clusters[0].high
        columns = targets
        nats = hidden.new_zeros((), dtype=torch.float32)
        for i, (low, high, _) in enumerate(self.clusters[1:], 1):
            positions = ((targets >= low) & (targets < high)).nonzero()[:, 0]
            columns = columns.index_fill(0, positions, first + len(self.clusters) - 1 - i)
            nats = nats + summed_nats(
                self._narrow(hidden[positions], i), tables[i], self.biases[i], targets[positions] - low
            )
        return nats + summed_nats(self._narrow(hidden, 0), *self.head(tables), columns)

    def _narrow(self, hidden: Tensor, i: int) -> Tensor:
        """Q_i^T h, [..., E] -> [..., w_i]."""
        return F.linear(hidden, self.projections[i].weight.mT)

    def head(self, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Weight [n_0 + C, E] and bias [n_0 + C] of the head."""
        return torch.cat((tables[0], self.cluster.weight)), torch.cat((self.biases[0], self.cluster.bias))


class BakedAdaptive(nn.Module):
    """Adaptive input and softmax with constant weights. Shapes depend on the number of tokens, not on their values."""

    def __init__(self, embedding: AdaptiveEmbedding, output: AdaptiveOutput) -> None:
        super().__init__()
        projections = [projection.weight for projection in embedding.projections]
        self.into = nn.Buffer(torch.cat(projections, -1).mT * embedding.scale)  # [sum w, E]
        weight, bias = output.head(embedding.weights)
        self.head = nn.Buffer(output.projections[0].weight @ weight.mT)  # [E, n_0 + C]
        self.head_bias = nn.Buffer(bias.clone())
        narrow = [projection.weight for projection in output.projections[1:]]
        self.narrow = nn.Buffer(torch.cat(narrow, -1))  # [E, w_1 + ... + w_C]
        self.table = nn.Buffer(embedding.weights[0].clone())  # [n_0, E]
        self.tails: list[BakedTail] = nn.ModuleList(  # type: ignore[assignment]
            BakedTail(table, bias) for table, bias in zip(embedding.weights[1:], output.biases[1:], strict=True)
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens: [...] int64 -> [..., E]."""
        return _look_up(tokens, [self.table, *(tail.table for tail in self.tails)]) @ self.into

    def logits(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next token, [..., E] -> [..., V] fp32."""
        head = (hidden @ self.head + self.head_bias).float()
        narrow = torch.split(hidden @ self.narrow, [tail.table.shape[1] for tail in self.tails], -1)
        tails = ((part @ tail.output + tail.bias).float() for part, tail in zip(narrow, self.tails, strict=True))
        return join_clusters(head, tails, sizes=[len(self.table), *(len(tail.table) for tail in self.tails)])


class BakedTail(nn.Module):
    """One tail: the table of its words in two layouts, one to look vectors up and one to multiply by."""

    def __init__(self, table: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.table = nn.Buffer(table.clone())  # [n, w]
        self.output = nn.Buffer(table.mT.contiguous())  # [w, n]
        self.bias = nn.Buffer(bias.clone())


def join_clusters(head: Tensor, tails: Iterable[Tensor], *, sizes: Sequence[int]) -> Tensor:
    """Log-probabilities [..., V] from the scores of the head [..., n_0 + C] and of the tails [..., n_i], all fp32.

    Args:
        tails: read one after another, so an iterator need not hold them all in memory.
        sizes: n_0, n_1 ...
    """
    head = head.log_softmax(-1)
    joined = head.new_empty(*head.shape[:-1], sum(sizes))
    low = sizes[0]
    joined[..., :low] = head[..., :low]
    for i, tail in enumerate(tails, 1):
        joined[..., low : low + sizes[i]] = head[..., -i, None] + tail.log_softmax(-1)
        low += sizes[i]
    return joined


def _projections(clusters: Sequence[Cluster], config: ModelConfig) -> list[nn.Linear]:
    """One linear map with a weight [E, w_i] for each cluster."""
    return nn.ModuleList(  # type: ignore[return-value]
        nn.Linear(cluster.width, config.width, bias=False) for cluster in clusters
    )


def _look_up(tokens: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Vectors of all clusters side by side, [...] -> [..., sum w]; zero in every cluster that lacks the token."""
    parts, low = [], 0
    for table in tables:
        index = tokens - low
        outside = (index < 0) | (index >= len(table))
        vectors = F.embedding(index.clamp(0, len(table) - 1), table)
        parts.append(vectors.masked_fill(outside[..., None], 0))
        low += len(table)
    return torch.cat(parts, -1)

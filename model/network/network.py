"""The network in its training form: embedding, attention layers over cached hidden states, output and loss.

Sizes: B streams, M tokens of a block, E width, D head size, L maximum span, V vocabulary. Knows no optimizer and no
data; `model.frozen.baked` turns it into the model that is served.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.adaptive import AdaptiveEmbedding, AdaptiveOutput
from model.config import ModelConfig
from model.cross_entropy import summed_nats
from model.network.layer import PersistentAttention
from model.spans import reach_of_heads


class StreamCache(NamedTuple):
    """The state that earlier blocks of the streams leave for the next block; carries no gradient."""

    # For each layer, at the L positions before the block (newest last, zero before the stream began): the inputs of the
    # layer [B, L, E], or the keys and values computed from them [B, L, 2 E].
    layers: tuple[Tensor, ...]
    filled: Tensor  # [B] int64 on the CPU: how many of the L positions exist

    def reset(self, streams: Tensor) -> "StreamCache":
        """Forget the past of the streams where `streams` [B] (bool) is true."""
        if not streams.any():
            return self
        layers = tuple(layer.masked_fill(streams.to(layer.device)[:, None, None], 0.0) for layer in self.layers)
        return StreamCache(layers, self.filled.masked_fill(streams, 0))


class AllAttentionLM(nn.Module):
    """An all-attention language model in training form (arXiv 1907.01470)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # recompute the activations inside each layer in the backward pass
        # Cache the keys and values of earlier blocks instead of the inputs of the layer: nothing is computed again, but
        # the keys and values come from older weights, and the projections get no gradient from them.
        self.cache_keys = False
        adaptive = config.embedding == "adaptive"
        self.embedding = AdaptiveEmbedding(config) if adaptive else nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.randn(config.head_size, config.max_span))
        self.layers: list[PersistentAttention] = nn.ModuleList(  # type: ignore[assignment]
            PersistentAttention(config) for _ in range(config.num_layers)
        )
        self.output = AdaptiveOutput(config) if adaptive else nn.Linear(config.width, config.vocab_size)

    def init_cache(self, num_streams: int) -> StreamCache:
        """The cache of fresh streams, in autocast's dtype, because the layers read the cache in that dtype."""
        config, kind = self.config, self.position.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.position.dtype
        size = config.width * (2 if self.cache_keys else 1)
        empty = self.position.new_zeros(num_streams, config.max_span, size, dtype=dtype)
        return StreamCache((empty,) * config.num_layers, torch.zeros(num_streams, dtype=torch.int64))

    def forward(self, tokens: Tensor, cache: StreamCache) -> tuple[Tensor, StreamCache]:
        """Read one block of every stream.

        Args:
            tokens: [B, M] int64, the block that follows the positions in the cache.

        Returns:
            hidden states [B, M, E] for `logits`, and the cache of the next block.
        """
        config = self.config
        hidden = self.embedding(tokens)
        hidden = F.dropout(hidden, config.embedding_dropout, self.training)
        table = self.position.flip(-1)  # [D, L], farthest first, as the keys are
        kept = []
        all_full = config.empty_slots == "zero" or int(cache.filled.min()) >= config.max_span
        filled = None if all_full else cache.filled.to(tokens.device)
        for layer, past, reaches in zip(self.layers, cache.layers, self.reaches(), strict=True):
            options: dict[str, Any] = {"reaches": reaches, "filled": filled, "cache_keys": self.cache_keys}
            if self.checkpoint_activations and torch.is_grad_enabled():
                hidden, new = checkpoint(layer, hidden, past, table, **options, use_reentrant=False)
            else:
                hidden, new = layer(hidden, past, table, **options)
            kept.append(torch.cat((past, new.to(past.dtype)), 1)[:, -config.max_span :])
        hidden = F.dropout(hidden, config.embedding_dropout, self.training)  # the input of the output embeddings
        seen = (cache.filled + tokens.shape[1]).clamp(max=config.max_span)
        return hidden, StreamCache(tuple(kept), seen)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, [..., E] -> [..., V]; with adaptive embeddings they are log-probabilities."""
        if isinstance(self.output, AdaptiveOutput):
            scores: Tensor = self.output(hidden, self._tables)
        else:
            scores = self.output(hidden)
        return scores

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy, in nats, of the next tokens `targets` [...] given hidden [..., E]: a scalar, fp32."""
        hidden, targets = hidden.flatten(0, -2), targets.flatten()
        if isinstance(self.output, AdaptiveOutput):
            return self.output.loss(hidden, self._tables, targets)
        return summed_nats(hidden, self.output.weight, self.output.bias, targets)

    @property
    def _tables(self) -> list[Tensor]:
        """The tables that adaptive input and adaptive softmax share."""
        assert isinstance(self.embedding, AdaptiveEmbedding)
        return self.embedding.weights

    def reaches(self) -> list[list[int]]:
        """For each layer and head, a distance beyond which the mask of the head and the mask's gradient are zero."""
        spans = torch.stack([layer.span.detach() for layer in self.layers]).tolist()
        beyond = [reach_of_heads(layer, config=self.config) for layer in spans]
        return [[min(self.config.max_span, reach + 1) for reach in layer] for layer in beyond]

    def span_penalty(self) -> Tensor:
        """L times the mean z of the heads, summed over the layers; training adds a small multiple of it to the loss."""
        return self.config.max_span * torch.stack([layer.span.mean() for layer in self.layers]).sum()

    @torch.no_grad()
    def clamp_spans(self) -> None:
        """Clamp every z to [0, 1]; call it after each update."""
        for layer in self.layers:
            layer.span.clamp_(0, 1)

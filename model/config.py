"""The configuration of a model, and the name and shape of every weight that follows from it. Knows no torch."""

import math
from itertools import pairwise
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelShape(BaseModel):
    """The configuration of a model without the size of its vocabulary, which the tokenizer decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_layers: int = Field(ge=1, description="attention layers; there are no feed-forward layers")
    width: int = Field(ge=1, description="E: size of the hidden states")
    num_heads: int = Field(ge=1, description="H: heads of a layer; the head size D is E / H")
    num_persistent: int = Field(ge=1, description="N: learned key/value pairs of each head")
    max_span: int = Field(ge=1, description="L: the largest distance a head may learn to look back")
    span_ramp: int = Field(default=32, ge=1, description="R: length of the soft edge of a span")
    span_init: float = Field(default=0.0, ge=0, le=1, description="z of every head at the start, as a share of L")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="on the attention probabilities, context and persistent"
    )
    embedding_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="on the input embeddings and on the input of the output layer"
    )
    embedding: Literal["plain", "adaptive"] = Field(
        default="plain", description="adaptive = adaptive input and adaptive softmax with tied weights, for words"
    )
    adaptive_cutoffs: tuple[int, ...] = Field(default=(), description="adaptive only: first id of each further cluster")
    adaptive_div: int = Field(default=4, ge=1, description="adaptive only: each cluster is this many times narrower")
    empty_slots: Literal["masked", "zero"] = Field(
        default="masked",
        description="what a query sees before the stream began: nothing, or (official code) zero vectors that take "
        "a share of the attention through the position term",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} must be a multiple of num_heads {self.num_heads}")
        if self.embedding == "plain" and self.adaptive_cutoffs:
            raise ValueError(f"adaptive_cutoffs {list(self.adaptive_cutoffs)} needs embedding = 'adaptive'")
        if self.adaptive_div ** len(self.adaptive_cutoffs) > self.width:
            raise ValueError(
                f"adaptive_div {self.adaptive_div} leaves nothing of width {self.width} for cluster "
                f"{len(self.adaptive_cutoffs)}"
            )
        return self

    def with_vocabulary(self, vocab_size: int) -> "ModelConfig":
        """The full configuration: this shape with a vocabulary of `vocab_size` tokens."""
        return ModelConfig(vocab_size=vocab_size, **self.model_dump())


class ModelConfig(ModelShape):
    """The configuration of an all-attention language model (arXiv 1907.01470): frozen, checked when it is made.

    Raises:
        pydantic.ValidationError: an unknown key, a wrong type or a value outside its range, named in the message.
    """

    vocab_size: int = Field(ge=2, description="V: symbols the tokenizer can produce")

    @model_validator(mode="after")
    def _cutoffs_rise(self) -> Self:
        edges = (0, *self.adaptive_cutoffs, self.vocab_size)
        if self.embedding == "adaptive" and (len(edges) == 2 or any(a >= b for a, b in pairwise(edges))):
            raise ValueError(
                f"adaptive_cutoffs {list(self.adaptive_cutoffs)} must rise strictly between 0 and vocab_size "
                f"{self.vocab_size}"
            )
        return self

    @property
    def head_size(self) -> int:
        """D = E / H."""
        return self.width // self.num_heads

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, in the order a bundle stores them."""
        width, heads, head, pairs = (self.width, self.num_heads, self.head_size, self.num_persistent)
        shapes: dict[str, tuple[int, ...]] = dict(self._embedding_shapes())
        shapes["position"] = (head, self.max_span)
        for i in range(self.num_layers):
            layer = f"layers.{i}."
            shapes |= {layer + name + ".weight": (width, width) for name in ("query", "key", "value", "out")}
            shapes[layer + "persistent_key"] = (heads, pairs, head)
            shapes[layer + "persistent_value"] = (heads, pairs, head)
            shapes[layer + "span"] = (heads,)
            shapes[layer + "norm.weight"] = (width,)
            shapes[layer + "norm.bias"] = (width,)
        return shapes

    def _embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.embedding == "plain":
            table = (self.vocab_size, self.width)
            return {"embedding.weight": table, "output.weight": table, "output.bias": (self.vocab_size,)}
        edges = (0, *self.adaptive_cutoffs, self.vocab_size)
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (low, high) in enumerate(pairwise(edges)):
            narrow = self.width // self.adaptive_div**i
            shapes[f"embedding.tables.{i}.weight"] = (high - low, narrow)
            shapes[f"embedding.projections.{i}.weight"] = (self.width, narrow)
            shapes[f"output.projections.{i}.weight"] = (self.width, narrow)
            shapes[f"output.biases.{i}"] = (high - low,)
        shapes["output.cluster.weight"] = (len(edges) - 2, self.width)
        shapes["output.cluster.bias"] = (len(edges) - 2,)
        return shapes

    @property
    def num_parameters(self) -> int:
        """Number of learned parameters; a tied weight counts once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

"""The graphs that every format exports: the steps of a baked model as functions of tensors, and their signatures.

Persistent vectors, span masks and position vectors are constants in the graphs. model/artefact.py defines the graphs.

Sizes: B rows, T new tokens, n positions, S slots, H heads, h heads of a group, D head size, E width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.artefact import GraphFacts, GraphName, TensorFacts
from model.frozen.baked import BakedLM

OPSET = 20  # of ONNX
ROWS, NEW, POSITIONS = "rows", "new", "positions"  # names of the sizes B, T and n, which may differ from call to call


class Steps(nn.Module):
    """The three graphs of a model. `rings` holds, for each group of each layer, its keys and values [B, h, S, D]."""

    def __init__(self, model: BakedLM) -> None:
        super().__init__()
        self.model = model
        self.is_masked = model.config.empty_slots == "masked"
        self.positions: dict[str, Tensor] = nn.ParameterDict(  # type: ignore[assignment]
            {
                name: nn.Parameter(table.position.mT.contiguous(), requires_grad=False)  # [2 S, D]
                for name, table in model.tables.items()
            }
        )

    def decode(self, tokens: Tensor, lengths: Tensor, *rings: Tensor) -> tuple[Tensor, ...]:
        """Read one token a row.

        Args:
            tokens, lengths: [B] int64.

        Returns:
            logits [B, V] and, for each layer, new keys and values [B, 1, 2, H, D].
        """
        views = {}
        for name, table in self.model.tables.items():
            num_slots = table.num_slots
            slots = torch.arange(num_slots, device=lengths.device)
            index = (num_slots - lengths % num_slots)[:, None] + slots  # [B, S]
            bias = table.log_mass[:, index]  # [heads, B, S]
            if self.is_masked:
                bias = bias.masked_fill(slots >= lengths[:, None], float("-inf"))
            views[name] = self.positions[name][index].mT, bias
        logits, new = self.model.decode_tensors(tokens, views, self._by_group(rings))
        return logits, *new

    def extend(self, tokens: Tensor, num_new: Tensor, lengths: Tensor, *rings: Tensor) -> tuple[Tensor, ...]:
        """Read several tokens a row.

        Args:
            tokens: [B, T] int64.
            num_new, lengths: [B] int64.

        Returns:
            hidden states [B, T, E], logits [B, V] after the last new token of each row, the share of attention on
            persistent vectors [B, T, layers] fp32, and, for each layer, new keys and values [B, T, 2, H, D].
        """
        by_group = self._by_group(rings)
        rows = torch.arange(tokens.shape[0], device=tokens.device)

        def recent(layer: int, group: int) -> Tensor:
            key, value = by_group[layer][group]
            _, heads, num_slots, _ = key.shape
            order = (lengths[:, None] + torch.arange(num_slots, device=lengths.device)) % num_slots  # [B, S]
            head = rows[:, None] * heads + torch.arange(heads, device=rows.device)  # [B, h]
            index = head[:, :, None] * num_slots + order[:, None]  # [B, h, S]
            return torch.stack([ring.flatten(0, 2)[index].transpose(0, 1) for ring in (key, value)])

        shares: list[Tensor] = []
        hidden, new = self.model.extend_tensors(tokens, recent, filled=lengths, shares=shares)
        last = hidden[rows, num_new - 1]  # [B, E]
        return hidden, self.model.logits(last), torch.stack(shares, -1), *new

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, E] -> logits [n, V] fp32."""
        return self.model.logits(hidden)

    def _by_group(self, rings: Sequence[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
        pairs = iter(zip(rings[::2], rings[1::2], strict=True))
        return [[next(pairs) for _ in layer.groups] for layer in self.model.layers]


class Signature(NamedTuple):
    """The inputs and outputs of a graph, and example inputs to trace it with."""

    name: GraphName
    inputs: list[TensorFacts]
    outputs: list[TensorFacts]
    example: tuple[Tensor, ...]

    @property
    def dynamic(self) -> tuple[dict[int, torch.export.Dim], ...]:
        """For each input, which of its sizes may differ from call to call."""
        sizes = {name: torch.export.Dim(name) for name in (ROWS, NEW, POSITIONS)}
        return tuple(
            {axis: sizes[size] for axis, size in enumerate(facts.shape) if isinstance(size, str)}
            for facts in self.inputs
        )

    def facts(self, file: str) -> GraphFacts:
        """The manifest's entry for the graph."""
        return GraphFacts(file=file, inputs=tuple(self.inputs), outputs=tuple(self.outputs))


class Graph(nn.Module):
    """One of the three graphs as a module."""

    def __init__(self, steps: Steps, name: GraphName) -> None:
        super().__init__()
        self.steps = steps
        self._name = name

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs of the graph."""
        step: Callable[..., Tensor | tuple[Tensor, ...]] = getattr(self.steps, self._name)
        return step(*inputs)


def signatures(model: BakedLM) -> list[Signature]:
    """The signatures of the three graphs of a model."""
    config, dtype = model.config, str(model.dtype).removeprefix("torch.")
    head = config.head_size
    tokens, lengths = TensorFacts(name="tokens", dtype="int64", shape=(ROWS,)), _int64("lengths")
    rings = [
        TensorFacts(
            name=f"layer{layer_index}.group{group_index}.{half}",
            dtype=dtype,
            shape=(ROWS, group.num_heads, group.num_slots, head),
        )
        for layer_index, layer in enumerate(model.layers)
        for group_index, group in enumerate(layer.groups)
        for half in ("key", "value")
    ]

    def new(num_tokens: int | str) -> list[TensorFacts]:
        shape = (ROWS, num_tokens, 2, config.num_heads, head)
        return [TensorFacts(name=f"layer{i}.new", dtype=dtype, shape=shape) for i in range(config.num_layers)]

    logits = TensorFacts(name="logits", dtype="float32", shape=(ROWS, config.vocab_size))
    hidden = TensorFacts(name="hidden", dtype=dtype, shape=(ROWS, NEW, config.width))
    share = TensorFacts(name="memory_share", dtype="float32", shape=(ROWS, NEW, config.num_layers))
    chunk = TensorFacts(name="tokens", dtype="int64", shape=(ROWS, NEW))
    found: list[tuple[GraphName, list[TensorFacts], list[TensorFacts]]] = [
        ("decode", [tokens, lengths, *rings], [logits, *new(1)]),
        ("extend", [chunk, _int64("num_new"), lengths, *rings], [hidden, logits, share, *new(NEW)]),
        (
            "logits",
            [TensorFacts(name="hidden", dtype=dtype, shape=(POSITIONS, config.width))],
            [TensorFacts(name="logits", dtype="float32", shape=(POSITIONS, config.vocab_size))],
        ),
    ]
    return [Signature(name, inputs, outputs, _example(inputs, model)) for name, inputs, outputs in found]


def _int64(name: str) -> TensorFacts:
    return TensorFacts(name=name, dtype="int64", shape=(ROWS,))


def _example(inputs: Sequence[TensorFacts], model: BakedLM) -> tuple[Tensor, ...]:
    """Tensors of ones. No size is 0 or 1, because a tracer takes these sizes for constants."""
    sizes = {ROWS: 2, NEW: 3, POSITIONS: 5}
    return tuple(
        torch.ones(
            [sizes[size] if isinstance(size, str) else size for size in facts.shape],
            dtype=getattr(torch, facts.dtype),
            device=model.device,
        )
        for facts in inputs
    )

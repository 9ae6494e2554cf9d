"""The trained network as torch serves it: scalings are folded into the weights, masks and positions into tables.

`bake` makes it from a trained network and changes nothing else. A step reads the rings, returns its outputs with the
new keys and values, and changes nothing; the owner of the cache commits the keys and values. There are two steps, and
a test holds them equal: `decode` takes one token of each of the first rows and reads the rings in place; `extend`
takes many tokens of any rows (prompts, documents). Each of them wraps a function of tensors alone, `decode_tensors` and
`extend_tensors`; export/ traces these two functions.

Sizes: B rows, T new tokens, E width, H heads, h heads of a group, D head size, S slots, N persistent vectors,
V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adaptive import AdaptiveEmbedding, AdaptiveOutput, BakedAdaptive
from model.attention import Block, banded_attention, decode_attention
from model.bundle import Bundle
from model.config import ModelConfig
from model.frozen.cache import RingCache
from model.frozen.served import TORCH_INVARIANT_ROWS
from model.network.layer import PersistentAttention
from model.network.network import AllAttentionLM
from model.spans import HeadGroup, group_heads, reach_of_heads, span_mask

Pair = tuple[Tensor, Tensor]  # keys and values, or position vectors and biases


class BakedLayer(nn.Module):
    """One layer with its heads sorted by ring size and its scalings folded in."""

    def __init__(self, layer: PersistentAttention, groups: Sequence[HeadGroup], order: Sequence[int]) -> None:
        super().__init__()
        config = layer.config
        heads, head = config.num_heads, config.head_size
        query, key, value = (
            projection.weight.view(heads, head, -1)[list(order)] for projection in (layer.query, layer.key, layer.value)
        )
        self.groups = tuple(groups)
        # Products are x @ W, with W stored as [in, out]: at batch 1 this reads memory 1.5 times as fast as F.linear.
        self.qkv = nn.Buffer(torch.cat((query / math.sqrt(head), key, value)).flatten(0, 1).mT.contiguous())  # [E, 3 E]
        self.out = nn.Buffer(
            layer.out.weight.view(-1, heads, head)[:, list(order)].flatten(1).mT.contiguous()
        )  # [E, E]
        self.persistent_key = nn.Buffer(
            (layer.persistent_key[list(order)] * math.sqrt(head)).mT.contiguous()
        )  # [H, D, N]
        self.persistent_value = nn.Buffer(layer.persistent_value[list(order)] * math.sqrt(config.num_persistent))
        self.norm_weight = nn.Buffer(layer.norm.weight.clone())
        self.norm_bias = nn.Buffer(layer.norm.bias.clone())

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return scaled queries [..., H, D], and keys and values [..., 2, H, D], of hidden states [..., E]."""
        heads, head, _ = self.persistent_key.shape
        projected = (hidden @ self.qkv).view(*hidden.shape[:-1], 3, heads, head)
        return projected[..., 0, :, :], projected[..., 1:, :, :]

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Apply output projection, residual and norm: [..., E] and [..., H, D] -> [..., E]."""
        hidden = hidden + attended.flatten(-2) @ self.out
        return F.layer_norm(hidden, hidden.shape[-1:], self.norm_weight, self.norm_bias)


class SlotTables(nn.Module):
    """Position vectors and span masks for rings of one size, wherever the newest slot lies.

    A ring whose next token goes to slot u has slot s at distance (u - 1 - s) mod S + 1. Each table holds its columns
    twice, one copy after the other, so that the table for any u is one stretch of memory, a view.
    """

    def __init__(self, position: Tensor, masks: Tensor) -> None:
        """Build the tables from position vectors [D, S] and masks [heads, S]; their columns are distances 1 .. S."""
        super().__init__()
        self.position = nn.Buffer(_twice_farthest_first(position).contiguous())  # [D, 2 S]
        self.log_mass = nn.Buffer(_twice_farthest_first(masks.log()).contiguous())  # [heads, 2 S]
        self.num_slots = position.shape[1]

    def views(self, lengths: np.ndarray, *, mask_empty: bool) -> tuple[Tensor, Tensor]:
        """Return position vectors [B, D, S] and biases [heads, B, S] of the slots of rows with these `lengths` [B]."""
        size = self.num_slots
        start = torch.from_numpy(size - lengths % size).to(self.position.device)
        position = self.position.unfold(-1, size, 1).transpose(0, 1)[start]  # [B, D, S]
        bias = self.log_mass.unfold(-1, size, 1)[:, start]  # [heads, B, S]
        if mask_empty and (lengths < size).any():
            empty = (
                np.arange(size) >= lengths[:, None]
            )  # [B, S]: a row that is not full has filled its slots 0 .. length - 1
            bias.masked_fill_(torch.from_numpy(empty).to(bias.device), float("-inf"))
        return position, bias


class BakedLM(nn.Module):
    """A frozen all-attention language model, computed by torch; the header of this file explains its two steps."""

    backend = "torch"
    invariant_rows = TORCH_INVARIANT_ROWS

    def __init__(self, network: AllAttentionLM) -> None:
        super().__init__()
        self.config: ModelConfig = network.config
        self.adaptive: BakedAdaptive | None = None  # None: the three buffers below hold plain embeddings and the output
        if isinstance(network.embedding, AdaptiveEmbedding):
            assert isinstance(network.output, AdaptiveOutput)
            self.adaptive = BakedAdaptive(network.embedding, network.output)
        else:
            assert isinstance(network.output, nn.Linear)
            self.embedding = nn.Buffer(network.embedding.weight.clone())
            self.output_weight = nn.Buffer(network.output.weight.mT.contiguous())  # [E, V]
            self.output_bias = nn.Buffer(network.output.bias.clone())
        self.layers: list[BakedLayer] = nn.ModuleList()  # type: ignore[assignment]
        self.spans: list[list[int]] = []  # for each layer, the reach of each head in the order of training, in tokens
        masks: dict[int, list[Tensor]] = {}
        self.table_rows: list[list[slice]] = []  # for each layer and group, its heads' rows in the table of its size
        for layer in network.layers:
            reaches = reach_of_heads(layer.span.tolist(), config=self.config)
            groups, order = group_heads(reaches, max_span=self.config.max_span)
            self.spans.append(reaches)
            self.layers.append(BakedLayer(layer, groups, order))
            rows = []
            for group in groups:
                mask = span_mask(layer.span[order[group.heads]], num_slots=group.num_slots, config=self.config)
                known = masks.setdefault(group.num_slots, [])
                first = sum(len(other) for other in known)
                rows.append(slice(first, first + group.num_heads))
                known.append(mask)
            self.table_rows.append(rows)
        self.tables: dict[str, SlotTables] = nn.ModuleDict(  # type: ignore[assignment]
            {str(size): SlotTables(network.position[:, :size], torch.cat(known)) for size, known in masks.items()}
        )
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.layers[0].qkv.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of weights, rings and hidden states."""
        return self.layers[0].qkv.dtype

    @property
    def weights(self) -> str:
        """The name of the weights' number format."""
        return str(self.dtype).removeprefix("torch.")

    def allocate(self, num_rows: int) -> RingCache:
        """Return empty rings for `num_rows` streams."""
        return RingCache(
            [layer.groups for layer in self.layers],
            num_rows=num_rows,
            head_size=self.config.head_size,
            dtype=self.dtype,
            device=self.device,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the inputs of the first layer, [..., E], for tokens [...] int64."""
        return F.embedding(tokens, self.embedding) if self.adaptive is None else self.adaptive.embed(tokens)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: RingCache) -> tuple[Tensor, list[Tensor]]:
        """Compute one step: one new token of each of the first B rows of the cache.

        Args:
            tokens: [B] int64.

        Returns:
            logits of the next tokens [B, V] fp32, and for `RingCache.commit` the new keys and values of each layer
            [B, 1, 2, H, D].
        """
        lengths = cache.lengths[: len(tokens)]
        mask_empty = self.config.empty_slots == "masked"
        views = {name: table.views(lengths, mask_empty=mask_empty) for name, table in self.tables.items()}
        return self.decode_tensors(tokens, views, cache.some_rows(range(len(tokens))))

    def decode_tensors(
        self, tokens: Tensor, views: Mapping[str, Pair], rings: Sequence[Sequence[Pair]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute `decode` from tensors alone.

        Args:
            views: for each size of rings, position vectors [B, D, S] and biases [heads, B, S] of the rows' slots.
            rings: for each layer and group, keys and values [B, h, S, D].
        """
        hidden = self.embed(tokens)
        new = []
        for layer, own, table_rows in zip(self.layers, rings, self.table_rows, strict=True):
            query, pair = layer.project(hidden)
            tables = []
            for group, heads in zip(layer.groups, table_rows, strict=True):
                position, bias = views[str(group.num_slots)]
                tables.append((position, bias[heads].transpose(0, 1)))
            persistent = Block(layer.persistent_key, layer.persistent_value)
            hidden = layer.finish(hidden, decode_attention(query, own, tables, persistent))
            new.append(pair[:, None])
        return self.logits(hidden), new

    @torch.inference_mode()
    def extend(self, tokens: Tensor, cache: RingCache, rows: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Compute T new tokens of each of some rows; a shorter line is padded at the end with any token.

        Args:
            tokens: [B, T] int64, one line for each of `rows`.

        Returns:
            hidden states [B, T, E] and, for `RingCache.commit`, the new keys and values of each layer [B, T, 2, H, D].
        """
        return self._extend(tokens, cache, rows, None)

    @torch.inference_mode()
    def extend_with_memory_share(
        self, tokens: Tensor, cache: RingCache, rows: Sequence[int]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Do `extend`; also return the heads' mean share of attention on persistent vectors, [B, T, layers] fp32."""
        shares: list[Tensor] = []
        hidden, new = self._extend(tokens, cache, rows, shares)
        return hidden, new, torch.stack(shares, -1)

    def _extend(
        self, tokens: Tensor, cache: RingCache, rows: Sequence[int], shares: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        lengths = cache.lengths[list(rows)]
        return self.extend_tensors(
            tokens,
            lambda layer, group: cache.recent(layer, group, rows),
            filled=torch.from_numpy(lengths).to(self.device),
            shortest=int(lengths.min()),
            shares=shares,
        )

    def extend_tensors(
        self,
        tokens: Tensor,
        recent: Callable[[int, int], Tensor],
        *,
        filled: Tensor,
        shortest: int = 0,
        shares: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute `extend` from tensors alone.

        Args:
            recent: returns a layer's and group's keys and values [2, h, B, S, D] before the new tokens, oldest first.
            filled: [B], the number of tokens that each row has consumed.
            shortest: a lower bound of `filled`; rings that are certainly full need no mask.
            shares: if given, each layer appends its share of attention on persistent vectors, mean over heads, [B, T].
        """
        hidden = self.embed(tokens)
        new = []
        for index, layer in enumerate(self.layers):
            query, pair = layer.project(hidden)
            query = query.permute(2, 0, 1, 3)  # [H, B, T, D]
            fresh = pair.permute(2, 3, 0, 1, 4)  # [2, H, B, T, D]
            outputs: list[Tensor] = []
            by_group: list[Tensor] | None = None if shares is None else []
            for place, group in enumerate(layer.groups):
                table = self.tables[str(group.num_slots)]
                key, value = torch.cat((recent(index, place), fresh[:, group.heads]), 3)  # [h, B, S + T, D]
                is_masked = self.config.empty_slots == "masked" and shortest < group.num_slots
                attended = banded_attention(
                    query[group.heads],
                    key,
                    value,
                    Block(layer.persistent_key[group.heads].mT, layer.persistent_value[group.heads]),
                    position=table.position[:, : group.num_slots],
                    log_mass=table.log_mass[self.table_rows[index][place], : group.num_slots],
                    filled=filled if is_masked else None,
                    shares=by_group,
                )
                outputs.append(attended)
            hidden = layer.finish(hidden, torch.cat(outputs).permute(1, 2, 0, 3))
            new.append(pair)
            if shares is not None and by_group is not None:
                shares.append(torch.cat(by_group[1::2]).float().mean(0))  # the persistent block is the second of two
        return hidden, new

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] fp32 of hidden states [..., E]; adaptive embeddings give log-probabilities."""
        if self.adaptive is not None:
            return self.adaptive.logits(hidden)
        return (hidden @ self.output_weight + self.output_bias).float()


def bake(network: AllAttentionLM, *, dtype: torch.dtype = torch.float32) -> BakedLM:
    """Freeze a trained network. Masks and scalings are computed in fp32, then everything is rounded to `dtype`."""
    with torch.no_grad():
        return BakedLM(network).to(dtype)


def load_baked(bundle: Bundle, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> BakedLM:
    """Return the model of a bundle, frozen. Raises BundleError as `Bundle.tensors` does."""
    network = AllAttentionLM(bundle.config)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in bundle.tensors().items()})
    return bake(network, dtype=dtype).to(device).eval()


def _twice_farthest_first(by_distance: Tensor) -> Tensor:
    flipped = by_distance.flip(-1)
    return torch.cat((flipped, flipped), -1)

"""Checkpoints with random weights in the layout of the paper's code, and the formulas of that code.

Written from the names, shapes and equations of github.com/facebookresearch/adaptive-span, not from the importer. This
file states the meaning of its checkpoints a second time, element by element, through tests/oracle.py. As in that code,
positions before the begin of the stream are zero vectors.

Sizes: V symbols, E width, H heads, D head size, N persistent vectors, L maximum span, T tokens.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.bundle import Bundle, open_bundle
from tests import oracle
from training.import_official import main

LAYERS, HEADS, HEAD, PAIRS, SPAN, RAMP = 2, 2, 4, 3, 12, 4
WIDTH = HEADS * HEAD

State = dict[str, Tensor]


def plain_state(num_symbols: int, *, spans: bool = True) -> State:
    """Return the weights of a model for characters, without "module." before the names."""
    torch.manual_seed(5)
    return {
        "in_emb.weight": torch.randn(num_symbols, WIDTH),
        "out_emb.weight": torch.randn(num_symbols, WIDTH),
        "out_emb.bias": torch.randn(num_symbols),
    } | _body(spans=spans)


def adaptive_state(sizes: Sequence[int], *, div: int = 2, tied_projections: bool = True) -> State:
    """Return the weights of a model for words, whose clusters have `sizes` words."""
    torch.manual_seed(6)
    further = len(sizes) - 1
    state = {
        "out_emb.cluster_proj.weight": torch.randn(further, WIDTH),
        "out_emb.cluster_proj.bias": torch.randn(further),
    }
    for i, size in enumerate(sizes):
        narrow = WIDTH // div**i
        table, projection = torch.randn(size, narrow), torch.randn(WIDTH, narrow) / math.sqrt(WIDTH)
        state[f"in_emb.emb_layers.{i}.weight"] = state[f"out_emb.out_layers.{i}.weight"] = table
        state[f"in_emb.emb_projs.{i}"] = projection
        state[f"out_emb.out_projs.{i}"] = projection if tied_projections else torch.randn(WIDTH, narrow)
        state[f"out_emb.out_layers.{i}.bias"] = torch.randn(size)
    return state | _body(spans=True)


def checkpoint(state: State, *, prefix: str = "module.") -> dict[str, Any]:
    """Return everything that the official code saves, as it is after one update of Adam."""
    moments = {i: {"step": 1, "exp_avg": torch.randn(3)} for i in range(2)}
    return {
        "iter_no": 7,
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "logger": {"step": [8000], "train_bpc": [1.5], "span_avg": [31.5]},
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.07, "betas": (0.9, 0.999), "params": [0, 1]}]},
        "scheduler_iter": 8000,
    }


def official_logits(state: State, tokens: Sequence[int]) -> oracle.Array:
    """Return the official model's logits for the symbol after each of `tokens`, with plain embeddings, [T, V]."""
    named = _numpy(state)
    hidden = _hidden(named, np.stack([named["in_emb.weight"][token] for token in tokens]))
    return np.stack([named["out_emb.weight"] @ row + named["out_emb.bias"] for row in hidden])


def official_logprobs(state: State, tokens: Sequence[int]) -> oracle.Array:
    """Return the log-probabilities for the symbol after each of `tokens`, with adaptive embeddings, [T, V]."""
    named = _numpy(state)
    num_clusters = sum(name.startswith("in_emb.emb_layers.") for name in named)
    words = [(i, j) for i in range(num_clusters) for j in range(len(named[f"in_emb.emb_layers.{i}.weight"]))]
    vectors = [named[f"in_emb.emb_projs.{i}"] @ named[f"in_emb.emb_layers.{i}.weight"][j] for i, j in words]
    hidden = _hidden(named, np.stack([math.sqrt(WIDTH) * vectors[token] for token in tokens]))
    rows = []
    for h in hidden:
        scores = [
            named[f"out_emb.out_layers.{i}.weight"] @ (named[f"out_emb.out_projs.{i}"].T @ h)
            + named[f"out_emb.out_layers.{i}.bias"]
            for i in range(num_clusters)
        ]
        entries = named["out_emb.cluster_proj.weight"] @ (named["out_emb.out_projs.0"].T @ h)
        head = _log_softmax(np.concatenate([scores[0], entries + named["out_emb.cluster_proj.bias"]]))
        tails = [head[-i] + _log_softmax(scores[i]) for i in range(1, num_clusters)]
        rows.append(np.concatenate([head[: len(scores[0])], *tails]))
    return np.stack(rows)


def saved(folder: Path, state: State, *, prefix: str = "module.", legacy: bool = False) -> Path:
    """Write the file that the official code writes for these weights, and return its path."""
    path = folder / "official.pt"
    torch.save(checkpoint(state, prefix=prefix), path, _use_new_zipfile_serialization=not legacy)
    return path


def imported(folder: Path, path: Path, vocab: str, *flags: str) -> Bundle:
    """Import the checkpoint at `path` and return the bundle. `vocab`: the text of train.txt, or "bytes"."""
    if vocab != "bytes":
        (folder / "train.txt").write_text(vocab, encoding="utf-8", newline="")
        vocab = str(folder / "train.txt")
    out = folder / "bundle"
    assert main([str(path), str(out), "--vocab", vocab, "--span-ramp", str(RAMP), *flags]) == 0
    return open_bundle(out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Return the message of an import that must fail."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert "Traceback" not in told.err
    return told.err


def refused_state(folder: Path, capsys: pytest.CaptureFixture[str], state: State) -> str:
    """Return the message of an import of these weights, which must fail."""
    told = refusal(capsys, saved(folder, state), folder / "bundle", "--vocab", "bytes")
    assert not (folder / "bundle").exists()
    return told


def _body(*, spans: bool) -> State:
    """Return all weights but the embeddings."""
    state = {"key_pe": torch.randn(1, HEAD, SPAN)}
    for i in range(LAYERS):
        attention = f"layers.{i}.attn.attn."
        state[attention + "persistent_memory.key"] = torch.randn(HEADS, HEAD, PAIRS) / math.sqrt(HEAD)
        state[attention + "persistent_memory.val"] = torch.randn(HEADS, PAIRS, HEAD) / math.sqrt(PAIRS)
        if spans:
            z = torch.tensor([0.15, 0.6]).roll(i).reshape(HEADS, 1, 1)
            for owner in ("", "persistent_memory."):
                state[f"{attention}{owner}adaptive_span._mask.current_val"] = z
                state[f"{attention}{owner}adaptive_span._mask.mask_template"] = torch.linspace(1 - SPAN, 0, SPAN)
        for name in ("query", "key", "val", "out"):
            state[f"layers.{i}.attn.proj_{name}.weight"] = torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH)
        state[f"layers.{i}.norm1.weight"] = 1 + 0.2 * torch.randn(WIDTH)
        state[f"layers.{i}.norm1.bias"] = 0.2 * torch.randn(WIDTH)
    return state


def _hidden(named: dict[str, oracle.Array], hidden: oracle.Array) -> oracle.Array:
    """Return the output of all layers, [T, E], for the embeddings [T, E]."""
    position = np.empty((HEAD, SPAN))
    for d in range(1, SPAN + 1):  # the query at position SPAN + t reads column l at position t + l
        position[:, d - 1] = named["key_pe"][0, :, SPAN - d]
    for i in range(LAYERS):
        attention = f"layers.{i}.attn."
        keys = named[attention + "attn.persistent_memory.key"]
        layer = {
            "query.weight": named[attention + "proj_query.weight"],
            "key.weight": named[attention + "proj_key.weight"],
            "value.weight": named[attention + "proj_val.weight"],
            "out.weight": named[attention + "proj_out.weight"],
            "persistent_key": np.stack([[keys[h, :, n] for n in range(PAIRS)] for h in range(HEADS)]),
            "persistent_value": named[attention + "attn.persistent_memory.val"],
            "span": named.get(attention + "attn.adaptive_span._mask.current_val", np.full(HEADS, 1e9)).ravel(),
        }
        out = oracle.attention(
            layer, hidden, position, num_heads=HEADS, max_span=SPAN, span_ramp=RAMP, empty_slots="zero"
        )
        weight, bias = named[f"layers.{i}.norm1.weight"], named[f"layers.{i}.norm1.bias"]
        hidden = np.stack([oracle.layer_norm(row, weight, bias) for row in hidden + out])
    return hidden


def _log_softmax(scores: oracle.Array) -> oracle.Array:
    top = scores.max()
    shifted: oracle.Array = scores - top - np.log(np.exp(scores - top).sum())
    return shifted


def _numpy(state: State) -> dict[str, oracle.Array]:
    return {name: tensor.double().numpy() for name, tensor in state.items()}

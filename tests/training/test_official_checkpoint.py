"""Files that cannot be imported: each is rejected with a message that names the key or the error; none runs code."""

import argparse
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.official_checkpoint import (
    SPAN,
    WIDTH,
    State,
    adaptive_state,
    checkpoint,
    plain_state,
    refusal,
    refused_state,
    saved,
)

SPAN_KEY = "layers.1.attn.attn.adaptive_span._mask."
SECOND = "layers.1.attn.attn.persistent_memory."


class Malice:
    """An object whose unpickling would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_checkpoint_with_code_in_it_is_refused_and_nothing_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], legacy: bool
) -> None:
    path, trace = tmp_path / "official.pt", tmp_path / "ran"
    whole = checkpoint(plain_state(256)) | {"logger": Malice(trace)}
    torch.save(whole, path, _use_new_zipfile_serialization=not legacy)
    told = refusal(capsys, path, tmp_path / "bundle", "--vocab", "bytes")
    assert not trace.exists()
    assert "asks for posix.mkdir" in told
    assert "nothing was run" in told
    torch.load(path, weights_only=False)  # the import did not do this
    assert trace.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], legacy: bool, share: float
) -> None:
    path = saved(tmp_path, plain_state(256), legacy=legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "cut short" in refusal(capsys, path, tmp_path / "bundle", "--vocab", "bytes")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, plain_state(256))
    content = bytearray(path.read_bytes())
    place = content.index(plain_state(256)["in_emb.weight"].numpy().tobytes()[:64])
    content[place] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(capsys, path, tmp_path / "bundle", "--vocab", "bytes")


@pytest.mark.parametrize(
    ("whole", "told"),
    [
        ({"net": {}}, "holds net; a checkpoint of the paper's code has its weights under 'model'"),
        ({"model": torch.zeros(2)}, "under 'model'"),
        ([1, 2], "holds list"),
        ({}, "holds nothing"),
        ({"model": {"module.key_pe": 1.5}}, "module.key_pe is not a plain tensor"),
        ({"model": {"key_pe": torch.zeros(2, dtype=torch.int64)}}, "key_pe is not a plain tensor"),
        ({"model": {"key_pe": torch.zeros(2, 2).to_sparse()}}, "key_pe is not a plain tensor"),
        ({"model": {}}, "lacks key_pe"),
        ({"model": {}, "logger": argparse.Namespace()}, "asks for argparse.Namespace"),
    ],
)
def test_a_file_that_is_no_such_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: Any, told: str
) -> None:
    torch.save(whole, tmp_path / "official.pt")
    assert told in refusal(capsys, tmp_path / "official.pt", tmp_path / "bundle", "--vocab", "bytes")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps({"model": 1}), b"PK\x03\x04 no zip"])
def test_a_file_that_torch_did_not_write_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    assert "not a checkpoint of torch" in refusal(capsys, tmp_path / "x.pt", tmp_path / "bundle", "--vocab", "bytes")


def test_a_zip_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, content in {"data.pkl": b"", "constants.pkl": b"", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", content)  # as TorchScript writes them; torch warns
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        told = refusal(capsys, tmp_path / "x.pt", tmp_path / "bundle", "--vocab", "bytes")
    assert "not a checkpoint of torch" in told
    assert seen == []


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refusal(capsys, tmp_path / "x.pt", tmp_path / "bundle", "--vocab", "bytes")
    assert "Is a directory" in refusal(capsys, tmp_path, tmp_path / "bundle", "--vocab", "bytes")


@pytest.mark.parametrize("key", sorted(plain_state(256).keys() - {SECOND + "adaptive_span._mask.current_val"}))
def test_a_missing_tensor_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    state = plain_state(256)
    del state[key]
    told = refused_state(tmp_path, capsys, state)
    named = "unexpected" if key.endswith("adaptive_span._mask.current_val") else "lacks"
    assert named in told
    assert key.removesuffix("current_val") in told


@pytest.mark.parametrize("key", sorted(plain_state(256)))
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    state = plain_state(256)
    state[key] = torch.cat((state[key], state[key]), -1)
    told = refused_state(tmp_path, capsys, state)
    assert "has shape" in told
    # The first tensor with a size determines it, so the message may name another tensor that does not fit.
    if key not in ("key_pe", "layers.0.attn.attn.persistent_memory.key"):
        assert f"error: {key} has shape {list(state[key].shape)}; beside the others it must be" in told


@pytest.mark.parametrize("key", ["key_pe", "in_emb.weight", "layers.0.attn.attn.persistent_memory.key"])
@pytest.mark.parametrize("shape", [(4,), (0, 0, 0, 0)])
def test_a_tensor_that_decides_sizes_needs_its_dimensions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, shape: tuple[int, ...]
) -> None:
    assert f"error: {key} has shape {list(shape)}; it must be [" in refused_state(
        tmp_path, capsys, plain_state(256) | {key: torch.zeros(shape)}
    )


@pytest.mark.parametrize("key", sorted(plain_state(256)))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: float
) -> None:
    state = plain_state(256)
    state[key] = state[key].clone()
    state[key].view(-1)[-1] = value
    assert f"error: {key} holds values that are not finite" in refused_state(tmp_path, capsys, state)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"layers.0.ff.fc1.weight": torch.ones(3, WIDTH)},
            "layers.0.ff.fc1.weight: this model has feed-forward layers",
        ),
        ({"layers.1.norm2.bias": torch.ones(WIDTH)}, "layers.1.norm2.bias: this model has feed-forward layers"),
        ({"layers.0.extra": torch.ones(1)}, "unexpected layers.0.extra"),
        ({"pos_emb": torch.ones(1)}, "unexpected pos_emb"),
        ({"layers.0.attn.proj_query.bias": torch.ones(WIDTH)}, "unexpected layers.0.attn.proj_query.bias"),
        ({"layers.3.norm1.bias": torch.ones(WIDTH)}, "lacks layers.2."),
        ({SPAN_KEY + "current_val": torch.tensor([0.5, 1.5]).view(2, 1, 1)}, "is from 0.5 to 1.5; spans are from 0 to"),
        ({SPAN_KEY + "current_val": torch.tensor([-0.1, 1]).view(2, 1, 1)}, "is from -0.1 to 1; spans are from 0 to"),
        ({SPAN_KEY + "current_val": torch.zeros(2, 1, 1)}, f"{SECOND}adaptive_span._mask.current_val differs from"),
        ({SPAN_KEY + "mask_template": torch.arange(0.0, SPAN)}, f"{SPAN_KEY}mask_template is not 1 - L .. 0"),
        (
            {SECOND + "adaptive_span._mask.mask_template": torch.arange(0.0, -SPAN, -1)},
            f"{SECOND}adaptive_span._mask.mask_template is not 1 - L .. 0",
        ),
    ],
)
def test_a_model_of_another_kind_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: State, told: str
) -> None:
    assert told in refused_state(tmp_path, capsys, plain_state(256) | change)


def test_a_vocabulary_of_one_symbol_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "in_emb.weight has 1 row" in refused_state(tmp_path, capsys, plain_state(1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"out_emb.out_layers.1.weight": torch.ones(2, 4)},
            "out_emb.out_layers.1.weight differs from in_emb.emb_layers.1",
        ),
        ({"in_emb.emb_layers.2.weight": torch.ones(2, 3)}, "in_emb.emb_layers are 8, 4, 3 wide"),
        ({"in_emb.emb_layers.0.weight": torch.ones(3, 7)}, "in_emb.emb_layers are 7, 4, 2 wide"),
        ({"in_emb.emb_projs.1": torch.ones(4, WIDTH)}, "in_emb.emb_projs.1 has shape [4, 8]"),
        ({"out_emb.cluster_proj.weight": torch.ones(3, WIDTH)}, "out_emb.cluster_proj.weight has shape [3, 8]"),
        ({"out_emb.weight": torch.ones(7, WIDTH)}, "unexpected out_emb.weight"),
        ({"in_emb.emb_layers.4.weight": torch.ones(2, 1)}, "unexpected in_emb.emb_layers.4.weight"),
    ],
)
def test_adaptive_embeddings_of_another_kind_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: State, told: str
) -> None:
    assert told in refused_state(tmp_path, capsys, adaptive_state([3, 2, 2]) | change)


@pytest.mark.parametrize("key", sorted(name for name in adaptive_state([3, 2, 2]) if "emb." in name))
def test_a_missing_part_of_adaptive_embeddings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    state = adaptive_state([3, 2, 2])
    del state[key]
    told = refused_state(tmp_path, capsys, state)
    table = key.startswith("in_emb.emb_layers")  # the number of tables is the number of clusters
    assert "emb" in told if table else f"lacks {key}" in told

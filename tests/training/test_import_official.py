"""Import of checkpoints of the paper's code: the bundle computes the same as that code, or the import says why not."""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import Bundle, open_bundle
from model.frozen.baked import bake
from model.network.network import AllAttentionLM
from tests.support.official_checkpoint import (
    HEADS,
    LAYERS,
    PAIRS,
    SPAN,
    WIDTH,
    State,
    adaptive_state,
    imported,
    official_logits,
    official_logprobs,
    plain_state,
    refusal,
    saved,
)
from training.import_official import main

NUM_TOKENS = 30  # more than a span
ENWIK8 = "60 109 60 255 \n 0 60 \n \n 32"  # "<m<\xff\n\0<\n\n "
ENWIK8_IDS = {60: 0, 109: 1, 255: 2, 10: 3, 0: 4, 32: 5}  # official id of each byte
TEXT8 = "a _ c _ a b"
TEXT8_IDS = {ord("a"): 0, ord(" "): 1, ord("c"): 2, ord("b"): 3, 10: 4}
# counts: the 4, cat 3, <eos> 3, <unk> 2, sat 2, on 1, mat 1; of equal counts the token seen last comes first
WORDS = " the cat sat <unk>\n\n the cat sat on the mat <unk> cat the\n"
WORDS_BY_COUNT = ["the", "\n", "cat", "<unk>", "sat", "mat", "on"]
WORDS_AS_SEEN = ["the", "cat", "sat", "<unk>", "\n", "on", "mat"]


def logits_of(bundle: Bundle, tokens: Sequence[int]) -> list[np.ndarray]:
    """[T, V] after each of `tokens` on a fresh stream: training form, and baked model in chunks and token by token."""
    network = AllAttentionLM(bundle.config).eval()
    network.load_state_dict({name: torch.from_numpy(array) for name, array in bundle.tensors().items()})
    ids = torch.tensor(list(tokens))
    with torch.no_grad():
        hidden, _ = network(ids[None], network.init_cache(1))
        found = [network.logits(hidden)[0]]
    baked = bake(network)
    cache = baked.allocate(1)
    parts = []
    for chunk in ids.split(7):
        hidden, new = baked.extend(chunk[None], cache, [0])
        cache.commit([0], new, [len(chunk)])
        parts.append(baked.logits(hidden[0]))
    cache, single = baked.allocate(1), []
    for token in ids:
        logits, new = baked.decode(token[None], cache)
        cache.commit([0], new, [1])
        single.append(logits)
    return [logits.numpy() for logits in (*found, torch.cat(parts), torch.cat(single))]


def stream(num_symbols: int) -> list[int]:
    return np.random.default_rng(3).integers(num_symbols, size=NUM_TOKENS).tolist()


def assert_agrees(bundle: Bundle, state: State, our_ids: Sequence[int]) -> None:
    """Assert that the bundle's logits equal the official formulas; official symbol i is our `our_ids[i]`."""
    tokens = stream(len(our_ids))
    want = official_logits(state, tokens) if "in_emb.weight" in state else official_logprobs(state, tokens)
    assert np.ptp(want) > 3
    for logits in logits_of(bundle, [our_ids[token] for token in tokens]):
        assert np.abs(logits[:, list(our_ids)] - want).max() < 1e-4


def in_official_order(ids: dict[int, int]) -> list[int]:
    return sorted(ids, key=ids.__getitem__)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_a_model_of_decimal_bytes_gives_the_official_logits(tmp_path: Path, prefix: str) -> None:
    state = plain_state(len(ENWIK8_IDS))
    bundle = imported(tmp_path, saved(tmp_path, state, prefix=prefix), ENWIK8)
    assert_agrees(bundle, state, in_official_order(ENWIK8_IDS))


def test_a_model_of_letters_gives_the_official_logits(tmp_path: Path) -> None:
    state = plain_state(len(TEXT8_IDS))
    assert_agrees(imported(tmp_path, saved(tmp_path, state), TEXT8), state, in_official_order(TEXT8_IDS))


def test_a_model_of_byte_ids_gives_the_official_logits(tmp_path: Path) -> None:
    state = plain_state(256)
    assert_agrees(imported(tmp_path, saved(tmp_path, state), "bytes"), state, range(256))


def test_a_model_of_words_without_adaptive_embeddings_gives_the_official_logits(tmp_path: Path) -> None:
    state = plain_state(len(WORDS_AS_SEEN))
    bundle = imported(tmp_path, saved(tmp_path, state), WORDS)
    assert [bundle.tokenizer.encode(word) for word in WORDS_AS_SEEN] == [[i] for i in range(len(WORDS_AS_SEEN))]
    assert_agrees(bundle, state, range(len(WORDS_AS_SEEN)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied projections", "own projections"])
def test_a_model_of_words_with_adaptive_embeddings_gives_the_official_logits(tmp_path: Path, tied: bool) -> None:
    state = adaptive_state([3, 2, 2], tied_projections=tied)
    bundle = imported(tmp_path, saved(tmp_path, state), WORDS)
    assert [bundle.tokenizer.encode(word) for word in WORDS_BY_COUNT] == [[i] for i in range(len(WORDS_BY_COUNT))]
    assert (bundle.config.embedding, bundle.config.adaptive_cutoffs, bundle.config.adaptive_div) == (
        "adaptive",
        (3, 5),
        2,
    )
    assert_agrees(bundle, state, range(len(WORDS_BY_COUNT)))


def test_a_model_without_spans_sees_all_distances(tmp_path: Path) -> None:
    state = plain_state(256, spans=False)
    assert_agrees(imported(tmp_path, saved(tmp_path, state), "bytes"), state, range(256))


def test_the_ramp_is_what_the_flag_says(tmp_path: Path) -> None:
    state = plain_state(256)
    bundle = imported(tmp_path, saved(tmp_path, state), "bytes", "--span-ramp", "1")
    assert bundle.config.span_ramp == 1
    with pytest.raises(AssertionError):
        assert_agrees(bundle, state, range(256))


def test_the_configuration_is_read_off_the_shapes(tmp_path: Path) -> None:
    flags = ("--dropout", "0.3", "--embedding-dropout", "0.1")
    config = imported(tmp_path, saved(tmp_path, plain_state(256)), "bytes", *flags).config
    found = (config.num_layers, config.width, config.num_heads, config.num_persistent, config.max_span)
    assert found == (LAYERS, WIDTH, HEADS, PAIRS, SPAN)
    assert (config.empty_slots, config.dropout, config.embedding_dropout) == ("zero", 0.3, 0.1)


def test_the_ramp_is_the_papers_where_no_flag_says_otherwise(tmp_path: Path) -> None:
    path = saved(tmp_path, plain_state(256))
    assert main([str(path), str(tmp_path / "bundle"), "--vocab", "bytes"]) == 0
    assert open_bundle(tmp_path / "bundle").config.span_ramp == 32


def test_bytes_that_were_no_symbol_have_probability_zero_and_change_nothing(tmp_path: Path) -> None:
    state = plain_state(len(ENWIK8_IDS))
    bundle = imported(tmp_path, saved(tmp_path, state), ENWIK8)
    tokens, used = stream(len(ENWIK8_IDS)), in_official_order(ENWIK8_IDS)
    want = torch.from_numpy(official_logits(state, tokens)).softmax(-1).numpy()
    for logits in logits_of(bundle, [used[token] for token in tokens]):
        probabilities = torch.from_numpy(logits).softmax(-1).numpy()
        unused = np.delete(probabilities, used, axis=1)
        assert unused.shape == (NUM_TOKENS, 250)
        assert (unused == 0).all()
        assert np.isfinite(logits).all()
        assert np.abs(probabilities[:, used] - want).max() < 1e-6
    (logits, *_) = logits_of(bundle, [1, 2, 3])  # bytes without a symbol can still be input
    assert np.isfinite(logits).all()


def test_an_end_of_line_beside_a_symbol_for_byte_10_is_dropped(tmp_path: Path) -> None:
    state = plain_state(3)
    bundle = imported(tmp_path, saved(tmp_path, state), "65 10")
    kept = {name: tensor[:2] if "emb." in name else tensor for name, tensor in state.items()}
    assert_agrees(bundle, kept, [65, 10])
    assert "dropped" in bundle.training["vocabulary"]["eos"]
    assert "dropped" in bundle.card


@pytest.mark.parametrize(("text", "flags"), [("1 2", ("--symbols", "letters")), ("49 50", ())])
def test_the_kind_of_symbols_can_be_said(tmp_path: Path, text: str, flags: tuple[str, ...]) -> None:
    state = plain_state(3)
    assert_agrees(imported(tmp_path, saved(tmp_path, state), text, *flags), state, [49, 50, 10])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_the_same_numbers_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in plain_state(256).items()}
    bundle = imported(tmp_path, saved(tmp_path, state), "bytes")
    assert_agrees(bundle, state, range(256))
    assert json.loads((bundle.path / "config.json").read_text())["weights"]["dtype"] == "float32"


def test_a_checkpoint_of_an_old_torch_saved_on_a_gpu_is_read(tmp_path: Path) -> None:
    state = plain_state(256)
    path = saved(tmp_path, state, legacy=True)
    content = path.read_bytes().replace(b"ctorch\nFloatStorage", b"ctorch.cuda\nFloatStorage")
    assert b"torch.cuda" in content
    path.write_bytes(content)
    assert_agrees(imported(tmp_path, path, "bytes"), state, range(256))


def test_a_checkpoint_that_was_packed_again_is_read(tmp_path: Path) -> None:
    state = plain_state(256)
    path = saved(tmp_path, state)
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert_agrees(imported(tmp_path, path, "bytes"), state, range(256))


def test_the_bundle_says_where_it_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = imported(tmp_path, saved(tmp_path, plain_state(len(ENWIK8_IDS))), ENWIK8)
    facts = bundle.training
    assert facts["imported_from"] == "official.pt"
    assert facts["sha256"] == hashlib.sha256((tmp_path / "official.pt").read_bytes()).hexdigest()
    assert facts["vocabulary"] == {
        "source": "train.txt",
        "sha256": hashlib.sha256(ENWIK8.encode()).hexdigest(),
        "symbols": "bytes",
        "num_symbols": 6,
        "num_unused_ids": 250,
        "eos": "is the line end, byte 10",
    }
    assert facts["empty_slots"] == "zero"
    assert facts["spans"] == [[6, 12], [12, 6]]  # ceil(0.15 * 12) + 4 and ceil(0.6 * 12) + 4, the weights' second
    for told in (
        "# bundle",
        facts["sha256"],
        "Check\nthe licence",
        "CC-BY-NC",
        "`train.txt`",
        "250 ids",
        "| 1 | 12, 6 |",
    ):
        assert told.replace("\n", " ") in bundle.card.replace("\n", " ")
    out = capsys.readouterr().out
    assert out == f"wrote {bundle.path}; to serve it:\n  make serve BUNDLE={bundle.path}\n"


def test_spans_need_not_be_stored_twice(tmp_path: Path) -> None:
    full = plain_state(256)
    state = {name: tensor for name, tensor in full.items() if "persistent_memory.adaptive_span" not in name}
    assert_agrees(imported(tmp_path, saved(tmp_path, state), "bytes"), full, range(256))


@pytest.mark.parametrize(
    "flags", [("--span-ramp", "0"), ("--dropout", "1"), ("--dropout", "-0.1"), ("--span-ramp", "x")]
)
def test_a_flag_out_of_its_range_is_refused(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["a.pt", "out", "--vocab", "bytes", *flags])
    assert ending.value.code == 2
    assert f"argument {flags[0]}" in capsys.readouterr().err


def test_a_folder_that_is_no_bundle_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, plain_state(256))
    assert "is not a bundle" in refusal(capsys, path, tmp_path, "--vocab", "bytes")
    assert [entry.name for entry in tmp_path.iterdir()] == ["official.pt"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, plain_state(256))
    assert "cannot be written" in refusal(capsys, path, path / "bundle", "--vocab", "bytes")


def test_a_bundle_that_is_there_is_replaced(tmp_path: Path) -> None:
    first = imported(tmp_path, saved(tmp_path, plain_state(256)), "bytes")
    state = plain_state(256) | {"out_emb.bias": torch.zeros(256)}
    assert imported(tmp_path, saved(tmp_path, state), "bytes").hash != first.hash

"""Bundles: a saved bundle reads back, every error is named, and a failed save leaves everything unchanged."""

import hashlib
import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.numpy import save as serialize_tensors

from model.bundle import CARD, CONFIG, TOKENIZER, WEIGHTS, BundleError, open_bundle, save_bundle
from model.config import ModelConfig
from model.network.network import AllAttentionLM
from model.tokenizer import BytesTokenizer, Tokenizer, train_bpe, train_words

SMALL = ModelConfig(vocab_size=256, num_layers=2, width=8, num_heads=2, num_persistent=3, max_span=5)
WORDS = SMALL.model_copy(
    update={"vocab_size": 7, "embedding": "adaptive", "adaptive_cutoffs": (3, 5), "adaptive_div": 2}
)
TRAINING = {"corpus": "shakespeare", "steps": 20, "valid": {"bits_per_byte": 2.5}, "seeds": [1, 2], "notes": None}

Tensors = dict[str, NDArray[Any]]


def random_tensors(config: ModelConfig = SMALL, *, seed: int = 0, dtype: type = np.float32) -> Tensors:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in config.tensor_shapes().items()}


class Given(NamedTuple):
    """Valid arguments of `save_bundle`; a test makes one of them invalid."""

    config: ModelConfig = SMALL
    tokenizer: Tokenizer = BytesTokenizer()
    card: str = "# Größe\r\n"
    training: dict[str, Any] = TRAINING


GOOD = Given()


def save(path: Path, tensors: Tensors, given: Given = GOOD) -> None:
    save_bundle(path, tensors=tensors, **given._asdict())


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "shelf" / "bundle"
    save(path, random_tensors())
    return path


def edit_config(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((bundle / CONFIG).read_text())
    edit(document)
    (bundle / CONFIG).write_text(json.dumps(document))


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Change a file and update the hashes."""
    (bundle / name).write_bytes(content)
    part = {WEIGHTS: "weights", TOKENIZER: "tokenizer"}[name]
    edit_config(bundle, lambda document: document[part].update(sha256=hashlib.sha256(content).hexdigest()))


def replace_weights(bundle: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(bundle / WEIGHTS)
    edit(tensors)
    replace_file(bundle, WEIGHTS, serialize_tensors(tensors))


# Reading back


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_bundle_gives_back_what_was_saved(dtype: type, tmp_path: Path) -> None:
    tensors = random_tensors(dtype=dtype)
    save(tmp_path / "bundle", tensors)
    bundle = open_bundle(tmp_path / "bundle")
    read = bundle.tensors()

    assert (bundle.config, bundle.card, bundle.training) == (SMALL, "# Größe\r\n", TRAINING)
    assert bundle.tokenizer.kind == "bytes"
    assert list(read) == list(SMALL.tensor_shapes())
    for name, array in read.items():
        assert array.dtype == np.float32
        assert array.flags.writeable
        np.testing.assert_array_equal(array, tensors[name].astype(np.float32))


def test_adaptive_words_and_bpe_make_bundles_too(tmp_path: Path) -> None:
    save(tmp_path / "words", random_tensors(WORDS), Given(config=WORDS, tokenizer=train_words(["a b c d e\n"])))
    bpe = train_bpe(["hello hello"], vocab_size=260, eos=True)
    config = SMALL.model_copy(update={"vocab_size": 260})
    save(tmp_path / "bpe", random_tensors(config), Given(config=config, tokenizer=bpe))

    assert open_bundle(tmp_path / "words").config == WORDS
    assert open_bundle(tmp_path / "bpe").tokenizer.eos_id == 259


def test_the_network_takes_the_tensors_without_a_copy_or_a_warning(saved: Path) -> None:
    tensors = open_bundle(saved).tensors()
    network = AllAttentionLM(SMALL)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})

    np.testing.assert_array_equal(network.state_dict()["position"].numpy(), tensors["position"])


def test_arrays_that_lie_transposed_in_memory_are_stored_right(tmp_path: Path) -> None:
    tensors = random_tensors()
    save(tmp_path / "bundle", {name: np.asfortranarray(array) for name, array in tensors.items()})

    for name, array in open_bundle(tmp_path / "bundle").tensors().items():
        np.testing.assert_array_equal(array, tensors[name])


def test_equal_weights_have_an_equal_hash_which_is_that_of_the_file(saved: Path, tmp_path: Path) -> None:
    save(tmp_path / "again", dict(reversed(random_tensors().items())), Given(card="another card"))

    assert open_bundle(tmp_path / "again").hash == open_bundle(saved).hash
    assert open_bundle(saved).hash == hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest()


def test_config_json_holds_the_documented_facts(saved: Path) -> None:
    document = json.loads((saved / CONFIG).read_text())

    assert list(document) == ["format", "model", "weights", "tokenizer", "training"]
    assert document["format"] == 1
    assert ModelConfig.model_validate(document["model"]) == SMALL
    assert document["weights"]["dtype"] == "float32"
    assert document["weights"]["num_parameters"] == SMALL.num_parameters


def test_files_get_the_usual_permissions_not_those_of_a_temporary_folder(saved: Path) -> None:
    plain = saved.parent / "plain"
    plain.mkdir()

    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


# Errors in an opened bundle


@pytest.mark.parametrize("name", [CARD, CONFIG, WEIGHTS, TOKENIZER])
def test_a_missing_file_is_named(name: str, saved: Path) -> None:
    (saved / name).unlink()

    with pytest.raises(BundleError, match=rf"bundle lacks {name}; .*copy the bundle again"):
        open_bundle(saved)


def test_a_missing_folder_and_a_file_in_its_place_are_told_apart(saved: Path) -> None:
    with pytest.raises(BundleError, match="nowhere does not exist; a bundle is a folder"):
        open_bundle(saved.parent / "nowhere")
    with pytest.raises(BundleError, match=r"config\.json is a file; a bundle is a folder"):
        open_bundle(saved / CONFIG)


@pytest.mark.parametrize("kept", [0, 7, 100, 2000])
def test_weights_cut_short_are_named_with_both_sizes(kept: int, saved: Path) -> None:
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:kept])

    with pytest.raises(BundleError, match=rf"model\.safetensors is cut short: it has {kept} bytes, .*copy the bundle"):
        open_bundle(saved)


@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER])
def test_one_changed_byte_is_noticed(name: str, saved: Path) -> None:
    content = bytearray((saved / name).read_bytes())
    content[-9] ^= 1
    (saved / name).write_bytes(content)

    with pytest.raises(
        BundleError, match=rf"{name} was changed or cut short: its sha256 is [0-9a-f]+ and not [0-9a-f]+"
    ):
        open_bundle(saved)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (WEIGHTS, b"\xff" * 100_000, r"model\.safetensors is not a safetensors file"),
        (TOKENIZER, b"{}", r"tokenizer\.json is not a readable tokenizer file"),
    ],
)
def test_a_file_of_another_kind_is_refused(name: str, content: bytes, message: str, saved: Path) -> None:
    replace_file(saved, name, content)

    with pytest.raises(BundleError, match=message):
        open_bundle(saved)


def test_a_tokenizer_of_another_size_is_refused_with_both_sizes(saved: Path) -> None:
    other = saved.parent / "other.json"
    train_words(["a b c\n"]).save(other)
    replace_file(saved, TOKENIZER, other.read_bytes())
    with pytest.raises(BundleError, match=r"tokenizer\.json has 5 tokens and the model's vocab_size is 256"):
        open_bundle(saved)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (CARD, b"\xff", r"README\.md is not UTF-8 text .*copy the bundle again"),
        (CONFIG, b"\xff", r"config\.json is not UTF-8 text"),
        (CONFIG, b"{", r"config\.json is not valid JSON \(Expecting .*copy the bundle again"),
        (CONFIG, b"[1]", r"config\.json must hold a JSON object, not list"),
        (CONFIG, b"{}", r"config\.json: format is None and this version reads 1"),
        (CONFIG, b'{"format": 2}', r"config\.json: format is 2 and this version reads 1; open .* version of allattn"),
        (CONFIG, b'{"format": 1}', r"config\.json: model: Field required; weights: Field required"),
    ],
)
def test_a_broken_text_file_is_named_with_its_fault(name: str, content: bytes, message: str, saved: Path) -> None:
    (saved / name).write_bytes(content)

    with pytest.raises(BundleError, match=message):
        open_bundle(saved)


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("model", {"width": 0}, r"config\.json: model\.width: Input should be greater than or equal to 1"),
        ("model", {"width": 9}, r"config\.json: model: .*width 9 must be a multiple of num_heads 2"),
        ("model", {"depth": 3}, r"config\.json: model\.depth: Extra inputs are not permitted"),
        ("weights", {"dtype": "bfloat16"}, r"weights\.dtype: Input should be 'float32' or 'float16'"),
        (
            "weights",
            {"dtype": "float16"},
            r"weights says \d+ parameters of float16, model\.safetensors has \d+ of float32",
        ),
        ("weights", {"num_parameters": 3}, r"weights says 3 parameters of float32, model\.safetensors has \d+"),
    ],
)
def test_a_wrong_fact_in_the_config_is_named(part: str, fields: dict[str, Any], message: str, saved: Path) -> None:
    edit_config(saved, lambda document: document[part].update(fields))

    with pytest.raises(BundleError, match=message):
        open_bundle(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update(extra=np.zeros(2, np.float32)), r"model\.safetensors: unexpected extra"),
        (lambda t: t.update(extra=t.pop("position")), r"model\.safetensors: missing position"),
        (lambda t: t.update(position=t["position"].T.copy()), r"position has shape \(5, 4\), .* needs \(4, 5\)"),
        (lambda t: t["position"].fill(np.nan), r"position holds values that are not finite"),
        (lambda t: t["layers.1.span"].fill(np.inf), r"layers\.1\.span holds values that are not finite"),
        (lambda t: t.update(position=t["position"].astype(float)), "float32, float64; they must all be float32 or all"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(
    edit: Callable[[Tensors], object], message: str, saved: Path
) -> None:
    replace_weights(saved, edit)

    with pytest.raises(BundleError, match=message):
        open_bundle(saved)


def test_a_bundle_replaced_after_it_was_opened_gives_no_foreign_weights(saved: Path) -> None:
    bundle = open_bundle(saved)
    save(saved, random_tensors(seed=1))

    with pytest.raises(BundleError, match=r"model\.safetensors was changed"):
        bundle.tensors()


# Errors in a saved bundle


def spoiled(name: str, array: NDArray[Any]) -> Tensors:
    return random_tensors(seed=1) | {name: array}


@pytest.mark.parametrize(
    ("tensors", "given", "message"),
    [
        (spoiled("position", np.zeros((5, 4), np.float32)), GOOD, r"tensors: position has shape \(5, 4\)"),
        (spoiled("extra", np.zeros(2, np.float32)), GOOD, "tensors: unexpected extra"),
        (spoiled("position", np.full((4, 5), np.nan, np.float32)), GOOD, "tensors: position .* not finite"),
        (spoiled("position", np.zeros((4, 5))), GOOD, "tensors: weights are float32, float64"),
        (spoiled("position", np.zeros((4, 5), np.float16)), GOOD, "tensors: weights are float16, float32"),
        (random_tensors(), Given(tokenizer=train_words(["a\n"])), "tokenizer has 3 tokens .* vocab_size is 256"),
        (random_tensors(), Given(training={"where": Path("here")}), "training cannot .* as JSON: .*PosixPath"),
        (random_tensors(), Given(training={"loss": float("nan")}), "training cannot .* as JSON: Out of range float"),
        (random_tensors(), Given(card="\ud800"), "card: character 0 is a lone surrogate"),
    ],
)
def test_a_wrong_argument_leaves_the_old_bundle_and_nothing_else(
    tensors: Tensors, given: Given, message: str, saved: Path
) -> None:
    before = open_bundle(saved).hash

    for place in (saved, saved.parent / "new"):
        with pytest.raises(BundleError, match=message):
            save(place, tensors, given)

    assert open_bundle(saved).hash == before
    assert names_in(saved.parent) == ["bundle"]


class DiskFull(BytesTokenizer):
    """Simulate a disk that becomes full while a bundle is written."""

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(b"{")
        raise OSError(28, "No space left on device")


def test_a_disk_that_fills_up_leaves_the_old_bundle_and_no_litter(saved: Path) -> None:
    before = open_bundle(saved)

    with pytest.raises(OSError, match="No space left"):
        save(saved, random_tensors(seed=1), Given(tokenizer=DiskFull()))

    assert replace(open_bundle(saved), tokenizer=before.tokenizer) == before
    assert names_in(saved.parent) == ["bundle"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_swap_that_breaks_between_its_renames_puts_the_old_bundle_back(
    error: type[BaseException], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_bundle(saved).hash
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise error("stopped here")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(error, match="stopped here"):
        save(saved, random_tensors(seed=1))

    assert open_bundle(saved).hash == before
    assert names_in(saved.parent) == ["bundle"]


def test_saving_over_a_bundle_replaces_all_of_it_and_leaves_no_litter(saved: Path) -> None:
    save(saved, random_tensors(seed=1), Given(card="new", training={}))
    bundle = open_bundle(saved)

    assert (bundle.card, bundle.training) == ("new", {})
    np.testing.assert_array_equal(bundle.tensors()["position"], random_tensors(seed=1)["position"])
    assert names_in(saved.parent) == ["bundle"]
    assert names_in(saved) == sorted([CARD, CONFIG, WEIGHTS, TOKENIZER])


def test_an_empty_folder_may_be_filled_and_missing_parents_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", random_tensors())
    save(tmp_path / "a" / "b", random_tensors())

    assert open_bundle(tmp_path / "empty").hash == open_bundle(tmp_path / "a" / "b").hash


def test_a_link_to_a_bundle_stays_a_link(saved: Path) -> None:
    link = saved.parent / "latest"
    link.symlink_to(saved, target_is_directory=True)
    save(link, random_tensors(seed=1))

    assert link.is_symlink()
    assert open_bundle(saved).hash == open_bundle(link).hash


def test_what_is_not_only_a_bundle_is_never_replaced(saved: Path) -> None:
    work = saved / "thesis.tex"
    work.write_text("years of work")

    with pytest.raises(BundleError, match=r"is not a bundle \(it has .*thesis\.tex, .*it was left as it is"):
        save(saved, random_tensors())
    with pytest.raises(BundleError, match=r"thesis\.tex is a file; a bundle is a folder"):
        save(work, random_tensors())
    (saved / WEIGHTS).unlink()
    with pytest.raises(BundleError, match="is not a bundle"):
        save(saved, random_tensors())

    assert work.read_text() == "years of work"

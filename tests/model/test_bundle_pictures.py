"""Pictures of a bundle: written in the same swap as its files, optional, and other files in their folder are kept."""

from pathlib import Path

import numpy as np
import pytest

from model.bundle import BundleError, open_bundle, save_bundle
from model.config import ModelConfig
from model.tokenizer import BytesTokenizer

CONFIG = ModelConfig(vocab_size=256, num_layers=1, width=4, num_heads=2, num_persistent=2, max_span=3)
PNG = b"\x89PNG\r\n\x1a\n and so on"


def save(path: Path, *, seed: int = 0, **pictures: bytes) -> None:
    rng = np.random.default_rng(seed)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in CONFIG.tensor_shapes().items()}
    save_bundle(
        path,
        config=CONFIG,
        tokenizer=BytesTokenizer(),
        tensors=tensors,
        card="![loss](plots/loss.png)",
        training={},
        pictures=pictures,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    save(path, loss=PNG, spans=PNG + b"2")
    return path


def test_pictures_lie_in_plots_byte_for_byte(saved: Path) -> None:
    assert {file.name: file.read_bytes() for file in (saved / "plots").iterdir()} == {
        "loss.png": PNG,
        "spans.png": PNG + b"2",
    }


def test_a_bundle_without_pictures_has_no_folder_for_them(tmp_path: Path) -> None:
    save(tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "plots").exists()


def test_a_bundle_whose_pictures_are_lost_or_spoiled_is_still_a_bundle(saved: Path) -> None:
    whole = open_bundle(saved)
    (saved / "plots" / "loss.png").write_bytes(b"")
    assert open_bundle(saved).hash == whole.hash
    for file in (saved / "plots").iterdir():
        file.unlink()
    (saved / "plots").rmdir()
    assert open_bundle(saved).hash == whole.hash


def test_saving_over_a_bundle_replaces_its_pictures(saved: Path) -> None:
    before = open_bundle(saved).hash
    save(saved, seed=1, memory_share=PNG)
    assert [file.name for file in (saved / "plots").iterdir()] == ["memory_share.png"]
    assert open_bundle(saved).hash != before
    save(saved, seed=1)
    assert not (saved / "plots").exists()
    assert [entry.name for entry in saved.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("foreign", ["plots/thesis.tex", "plots/mine/photo.png", "thesis.tex"])
def test_a_bundle_with_something_else_in_it_is_never_replaced(foreign: str, saved: Path) -> None:
    (saved / foreign).parent.mkdir(exist_ok=True)
    (saved / foreign).write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle"):
        save(saved, seed=1)
    assert (saved / foreign).read_text() == "years of work"


def test_a_folder_with_nothing_but_pictures_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "holiday.png").write_bytes(PNG)
    with pytest.raises(BundleError, match=r"is not a bundle \(it has plots, .*pictures in plots/\)"):
        save(tmp_path)
    assert (tmp_path / "plots" / "holiday.png").exists()


def test_a_link_to_pictures_elsewhere_is_not_taken_for_a_folder_of_the_bundle(saved: Path) -> None:
    (saved / "plots").rename(saved.parent / "elsewhere")
    (saved / "plots").symlink_to(saved.parent / "elsewhere")
    with pytest.raises(BundleError, match="is not a bundle"):
        save(saved, seed=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("../loss", PNG, r"the name '\.\./loss' must be letters, digits"),
        ("", PNG, "the name '' must be"),
        ("loss", b"<svg/>", "pictures: loss is not a PNG file"),
        ("loss", b"", "pictures: loss is not a PNG file"),
    ],
)
def test_a_wrong_picture_is_named_before_anything_is_written(
    name: str, content: bytes, message: str, saved: Path
) -> None:
    before = open_bundle(saved).hash
    with pytest.raises(BundleError, match=message):
        save(saved, seed=1, **{name: content})
    assert open_bundle(saved).hash == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["bundle"]

"""Checkpoints: a checkpoint that was read equals the saved state, or it is not used at all."""

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.checkpoint import (
    CheckpointError,
    delete_checkpoints,
    forget_best,
    load_best,
    load_latest,
    save_best,
    save_checkpoint,
)

CONFIG: dict[str, Any] = {"seed": 1, "model": {"width": 8, "adaptive_cutoffs": []}, "optim": {"lr": 0.1}}


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(50, 20, generator=generator)
    return {"step": step, "config": CONFIG, "run": {"weights": weights, "random": generator.get_state(), "place": 3}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def loaded_step(folder: Path) -> int | None:
    found = load_latest(folder, config=CONFIG)
    return None if found is None else found["step"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints 1 and 2; tests restore the second after damaging it."""
    folder = tmp_path_factory.mktemp("two")
    save_checkpoint(folder, state(1))
    save_checkpoint(folder, state(2))
    return folder


def assert_passed_over(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    newest = folder / "step-000000002.pt"
    whole = newest.read_bytes()
    try:
        newest.write_bytes(damage(whole))
        with pytest.warns(UserWarning, match=r"step-000000002\.pt cannot be read"):
            assert loaded_step(folder) == 1
    finally:
        newest.write_bytes(whole)
    assert loaded_step(folder) == 2


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(7))
    found = load_latest(tmp_path, config=CONFIG)
    assert found is not None
    assert torch.equal(found["run"]["weights"], state(7)["run"]["weights"])
    assert torch.equal(found["run"]["random"], state(7)["run"]["random"])
    assert (found["step"], found["config"], found["run"]["place"]) == (7, CONFIG, 3)


def test_without_a_checkpoint_there_is_nothing(tmp_path: Path) -> None:
    assert load_latest(tmp_path, config=CONFIG) is None
    assert load_latest(tmp_path / "never made", config=CONFIG) is None


def test_the_last_few_stay(tmp_path: Path) -> None:
    for step in (5, 50, 500, 5000):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert names(tmp_path) == ["step-000000500.pt", "step-000005000.pt"]
    assert loaded_step(tmp_path) == 5000


def test_the_best_stays_while_the_others_come_and_go_and_is_not_gone_on_from(tmp_path: Path) -> None:
    assert load_best(tmp_path / "never made") is None
    for step in range(1, 6):
        save_checkpoint(tmp_path, state(step), keep=1)
        if step in (1, 3):
            save_best(tmp_path, state(step))
    assert names(tmp_path) == ["best.pt", "step-000000005.pt"]
    best = load_best(tmp_path)
    assert best is not None
    assert best["step"] == 3
    assert torch.equal(best["run"]["weights"], state(3)["run"]["weights"])
    assert loaded_step(tmp_path) == 5
    forget_best(tmp_path)
    forget_best(tmp_path)
    assert load_best(tmp_path) is None


def test_a_broken_best_is_told_of_and_passed_over(tmp_path: Path) -> None:
    save_best(tmp_path, state(3))
    (tmp_path / "best.pt").write_bytes((tmp_path / "best.pt").read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"best\.pt cannot be read .* the best is forgotten"):
        assert load_best(tmp_path) is None


def test_deleted_checkpoints_leave_nothing_not_even_what_a_killed_process_left(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for half_deleted in (folder, tmp_path / "checkpoints.finished"):
        save_checkpoint(half_deleted, state(1))
        save_best(half_deleted, state(1))
    delete_checkpoints(folder)
    assert names(tmp_path) == []


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_newest_checkpoint_cut_off_anywhere_gives_way_to_the_one_before(two: Path, share: float) -> None:
    assert_passed_over(two, lambda whole: whole[: int(share * len(whole))])


@given(place=st.integers(0, 3999), bit=st.integers(0, 7))
def test_a_newest_checkpoint_with_one_wrong_bit_in_its_weights_gives_way_to_the_one_before(
    two: Path, place: int, bit: int
) -> None:
    def flip(whole: bytes) -> bytes:
        at = whole.index(state(2)["run"]["weights"].numpy().tobytes()) + place
        return whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]

    assert_passed_over(two, flip)


def test_a_file_that_would_run_code_is_passed_over_and_does_not_run(two: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    bad = tmp_path / "bad.pt"
    torch.save({"step": 2, "config": CONFIG, "run": Code()}, bad)
    assert_passed_over(two, lambda _: bad.read_bytes())
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_outlives_broken_files_of_later_steps(tmp_path: Path) -> None:
    (tmp_path / "step-000009000.pt").write_bytes(b"broken")
    (tmp_path / "step-000008000.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert loaded_step(tmp_path) is None
    save_checkpoint(tmp_path, state(500), keep=1)
    assert names(tmp_path) == ["step-000000500.pt"]
    assert loaded_step(tmp_path) == 500


def test_what_a_killed_process_left_is_neither_read_nor_kept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1))
    (tmp_path / "next.writing").write_bytes(b"half of it")
    assert loaded_step(tmp_path) == 1
    save_checkpoint(tmp_path, state(2))
    assert names(tmp_path) == ["step-000000001.pt", "step-000000002.pt"]


def test_a_full_disk_is_named_and_costs_no_earlier_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written .*File too large"):
            save_checkpoint(tmp_path, state(2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-000000001.pt"]
    assert loaded_step(tmp_path) == 1


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"model": {"width": 16, "adaptive_cutoffs": []}}, ("model.width was 8 and is 16",)),
        ({"model": {"adaptive_cutoffs": []}}, ("model.width was 8 and is None",)),
        ({"tokenizer": {"kind": "word"}}, ("tokenizer.kind was None and is 'word'",)),
        ({"seed": 2, "optim": {"lr": 0.2}}, ("optim.lr was 0.1 and is 0.2", "seed was 1 and is 2")),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_with_each_difference(
    other: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, state(1))
    with pytest.raises(CheckpointError) as caught:
        load_latest(tmp_path, config=CONFIG | other)
    assert all(word in str(caught.value) for word in (*words, str(tmp_path), "delete"))
    assert loaded_step(tmp_path) == 1

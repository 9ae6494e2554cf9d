"""Checkpoints on disk: written atomically; the last few and the best are kept; a damaged checkpoint is skipped.

A checkpoint holds tensors and plain values, and loading it never runs code. Knows nothing else about its content.
"""

import os
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

BEST = "best.pt"


class CheckpointError(ValueError):
    """An unusable checkpoint; the message says what to do."""


def save_checkpoint(folder: Path, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `state` (which has a "step") as the newest checkpoint and delete all but the last `keep` checkpoints.

    Checkpoints of later steps are deleted too: `load_latest` skipped them because they are damaged.

    Raises:
        CheckpointError: the file cannot be written; earlier checkpoints are unchanged.
    """
    path = _write(folder / f"step-{state['step']:09d}.pt", state)
    files = _newest_first(folder)
    current = files.index(path)
    for other in files[:current] + files[current + keep :]:
        other.unlink()
    return path


def save_best(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as the best checkpoint of the run, replacing the previous best; `save_checkpoint` never deletes it.

    Raises:
        CheckpointError: the file cannot be written; the previous best is unchanged.
    """
    _write(folder / BEST, state)


def load_best(folder: Path) -> dict[str, Any] | None:
    """The best checkpoint, or None if there is none or, with a warning, if it cannot be read."""
    path = folder / BEST
    try:
        return _read(path) if path.exists() else None
    except Exception as error:  # torch raises half a dozen types for a damaged file
        warnings.warn(f"{path} cannot be read ({error}); the best is forgotten", stacklevel=2)
        return None


def forget_best(folder: Path) -> None:
    """Delete the best checkpoint, because it belongs to another run or was measured on other tokens."""
    (folder / BEST).unlink(missing_ok=True)


def delete_checkpoints(folder: Path) -> None:
    """Delete the folder. It is renamed first, so that no later run resumes from half a folder."""
    finished = folder.with_name(folder.name + ".finished")
    shutil.rmtree(finished, ignore_errors=True)  # left by a process that was killed here
    folder.rename(finished)
    shutil.rmtree(finished, ignore_errors=True)


def load_latest(folder: Path, *, config: dict[str, Any]) -> dict[str, Any] | None:
    """The newest readable checkpoint, or None if there is none.

    Args:
        config: the checkpoint's "config" must equal it; plain values, nested by section.

    Raises:
        CheckpointError: the newest readable checkpoint belongs to another configuration.
    """
    for path in _newest_first(folder):
        try:
            state = _read(path)
        except Exception as error:  # torch raises half a dozen types for a damaged file
            warnings.warn(f"{path} cannot be read ({error}); trying the checkpoint before it", stacklevel=2)
            continue
        ours, theirs = _flat(config), _flat(state["config"])
        changed = [
            f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]
        if changed:
            raise CheckpointError(
                f"{path} was written by a run with other settings ({'; '.join(changed)}): use those settings, "
                f"another `out`, or delete {folder} to begin anew"
            )
        return state
    return None


def _write(path: Path, state: dict[str, Any]) -> Path:
    """Write a file atomically: if the process or the machine dies, the file is whole or missing."""
    temporary = path.with_name("next.writing")  # a fixed name: it overwrites the rest of a killed process
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        for folder in (path.parent, path.parent.parent):
            _flush_names(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__ or error  # torch hides the OSError
        raise CheckpointError(f"{path} cannot be written ({reason}); the checkpoints before it are whole") from error
    return path


def _flush_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()  # torch.load does not verify checksums
    if broken:
        raise zipfile.BadZipFile(f"{broken} is damaged")
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    return state


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """{"optim": {"lr": 1}} as {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= (
            {f"{key}.{name}": inner for name, inner in _flat(value).items()}
            if isinstance(value, dict)
            else {key: value}
        )
    return flat


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)

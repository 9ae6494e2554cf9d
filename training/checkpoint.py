"""Resume state on disk: atomic files, the last few and the best kept, a broken newest one passed over.

Knows files and nothing of what is in them but that it is tensors and plain values: nothing is ever unpickled to code.
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
    """A checkpoint that cannot be used, and what to do about it."""


def save_checkpoint(folder: Path, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `state` (which has a "step") as the newest checkpoint and delete all but the last `keep`.

    Files of later steps go too: `load_latest` passed over them, so they are broken, and would count as the newest.

    Raises:
        CheckpointError: the disk is full or refuses; the checkpoints before are untouched.
    """
    path = _write(folder / f"step-{state['step']:09d}.pt", state)
    files = _newest_first(folder)
    current = files.index(path)
    for other in files[:current] + files[current + keep :]:
        other.unlink()
    return path


def save_best(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as the best of the run, in place of the one before; `save_checkpoint` never deletes it.

    Raises:
        CheckpointError: the disk is full or refuses; the best before is untouched.
    """
    _write(folder / BEST, state)


def load_best(folder: Path) -> dict[str, Any] | None:
    """What `save_best` wrote last, or None where there is nothing, or (with a warning) nothing readable."""
    path = folder / BEST
    try:
        return _read(path) if path.exists() else None
    except Exception as error:  # as above
        warnings.warn(f"{path} cannot be read ({error}); the best is forgotten", stacklevel=2)
        return None


def forget_best(folder: Path) -> None:
    """Delete what `save_best` wrote: it is of another run, or was measured otherwise."""
    (folder / BEST).unlink(missing_ok=True)


def delete_checkpoints(folder: Path) -> None:
    """Delete the folder. It goes under another name first: no later run goes on from half of it."""
    finished = folder.with_name(folder.name + ".finished")
    shutil.rmtree(finished, ignore_errors=True)  # of a process killed just here
    folder.rename(finished)
    shutil.rmtree(finished, ignore_errors=True)


def load_latest(folder: Path, *, config: dict[str, Any]) -> dict[str, Any] | None:
    """The newest readable checkpoint, or None where there is none.

    Args:
        config: what the checkpoint's own "config" must equal; plain values, nested by section.

    Raises:
        CheckpointError: the newest readable checkpoint belongs to another configuration.
    """
    for path in _newest_first(folder):
        try:
            state = _read(path)
        except Exception as error:  # torch raises half a dozen types for a file that is not whole
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
    """Write a file that is there whole or not at all, whatever dies meanwhile: this process or the machine."""
    temporary = path.with_name("next.writing")  # one name: what a killed process left is overwritten
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
        reason = (
            error if isinstance(error, OSError) else error.__context__ or error
        )  # torch covers the disk's own error
        raise CheckpointError(f"{path} cannot be written ({reason}); the checkpoints before it are whole") from error
    return path


def _flush_names(folder: Path) -> None:
    """Wait until a folder's list of names is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()  # torch.load does not compare check sums
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

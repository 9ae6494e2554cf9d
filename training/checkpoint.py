"""Resume state on disk: atomic files, the last few kept, a broken newest one passed over.

Knows files and nothing of what is in them but that it is tensors and plain values: nothing is ever unpickled to code.
"""

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and what to do about it."""


def save_checkpoint(folder: Path, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `state` (which has a "step") as the newest checkpoint and delete all but the last `keep`.

    Files of later steps go too: `load_latest` passed over them, so they are broken, and would count as the newest.

    Raises:
        CheckpointError: the disk is full or refuses; the checkpoints before are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state['step']:09d}.pt"
    temporary = folder / "next.writing"  # one name: what a killed process left is overwritten
    _write(temporary, state)
    temporary.replace(path)
    files = _newest_first(folder)
    current = files.index(path)
    for other in files[:current] + files[current + keep :]:
        other.unlink()
    return path


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


def _write(path: Path, state: dict[str, Any]) -> None:
    try:
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        path.unlink(missing_ok=True)
        reason = (
            error if isinstance(error, OSError) else error.__context__ or error
        )  # torch covers the disk's own error
        raise CheckpointError(f"{path} cannot be written ({reason}); the checkpoints before it are whole") from error


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()  # torch.load does not compare check sums
    if broken:
        raise zipfile.BadZipFile(f"{broken} is damaged")
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
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

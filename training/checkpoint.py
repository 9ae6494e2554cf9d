"""Resume state on disk: atomic files, the last few kept, a broken newest one passed over.

Knows files and nothing of what is in them but that it is tensors and plain values: nothing is ever unpickled to code.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and what to do about it."""


def save_checkpoint(folder: Path, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `state` (which has a "step") as the newest checkpoint, then delete all but the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state['step']:09d}.pt"
    temporary = path.with_suffix(".writing")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    for old in _newest_first(folder)[keep:]:
        old.unlink()
    for litter in folder.glob("*.writing"):
        litter.unlink()
    return path


def load_latest(folder: Path, *, config: dict[str, Any]) -> dict[str, Any] | None:
    """The newest readable checkpoint, or None where there is none.

    Args:
        config: what the checkpoint's own "config" must equal.

    Raises:
        CheckpointError: the newest readable checkpoint belongs to another configuration.
    """
    for path in _newest_first(folder):
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises half a dozen types for a file that is not whole
            warnings.warn(f"{path} cannot be read ({error}); trying the checkpoint before it", stacklevel=2)
            continue
        changed = sorted(
            key for key in config.keys() | state["config"].keys() if config.get(key) != state["config"].get(key)
        )
        if changed:
            raise CheckpointError(
                f"{path} was written by a run with other settings ({', '.join(changed)} differ); use those settings, "
                f"another `out`, or delete {folder} to begin anew"
            )
        return state
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)

"""Atomic replacement of a folder: no reader sees, and no crash leaves, half a folder under its name."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A fresh folder to fill, which takes the place of `target` when the block ends without an exception.

    `target` is the old folder or the new folder, never a part of either. Between two renames it does not exist for an
    instant: a machine that dies there leaves both folders beside it, whole, under hidden names.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = _hidden_sibling(target, "new")
    fresh.mkdir()
    try:
        yield fresh
        _flush(*fresh.rglob("*"), fresh)
        _swap(fresh, target=target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # gone already if the swap came through


def _swap(fresh: Path, *, target: Path) -> None:
    """Put the folder `fresh` in the place of `target`, then delete the old folder."""
    if not target.exists():
        fresh.rename(target)
        _flush(target.parent)
        return
    old = _hidden_sibling(target, "old")
    target.rename(old)
    try:
        fresh.rename(target)
    finally:
        if not target.exists():
            old.rename(target)
    _flush(target.parent)
    shutil.rmtree(old)


def _hidden_sibling(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{role}")


def _flush(*paths: Path) -> None:
    """Wait until the contents of files, or the names in folders, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

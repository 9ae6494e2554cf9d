"""Folders that are written as a whole: no reader and no crash ever sees half of one."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A fresh folder to fill, which takes the place of `target` when the block ends without an exception.

    `target` holds the old folder or the new one, never part of one. For an instant between two renames it holds none: a
    machine that dies right there leaves both beside it, whole, under hidden names.
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
    """Put the folder `fresh` where `target` is, and only then delete what was there."""
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


def _flush(*places: Path) -> None:
    """Wait until files, or folders' lists of names, are on the disk."""
    for place in places:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

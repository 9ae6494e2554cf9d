"""API keys: the form of a key, and the file that lists keys. No message of this module ever holds a key."""

import stat
from collections.abc import Sequence
from pathlib import Path

from pydantic import SecretStr

MIN_KEY_CHARS = 16
RULE = f"a key has at least {MIN_KEY_CHARS} visible ASCII characters"


def split_keys(text: str) -> list[str]:
    """Returns the keys of an environment variable, split at its commas. Raises ValueError if it holds none."""
    keys = [part.strip() for part in text.split(",") if part.strip()]
    if not keys:
        raise ValueError(f"it names no key and would leave the server open; {RULE}")
    return keys


def check_keys(keys: Sequence[SecretStr]) -> None:
    """Check the form of each key. Raises ValueError, which tells the place of the first wrong key."""
    for number, key in enumerate(keys, start=1):
        if not _is_key(key.get_secret_value()):
            raise ValueError(f"key {number} of {len(keys)}: {RULE}")


def read_key_file(path: Path) -> tuple[SecretStr, ...]:
    """Returns the keys of a file, which has one on each line; blank lines and comments (#) are skipped.

    Raises:
        ValueError: the file cannot be read, holds no key, or holds a wrong key; the message tells the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise ValueError(str(error.strerror)) from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    keys = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"it holds no key and would leave the server open; {RULE}")
    for number, key in keys:
        if not _is_key(key):
            raise ValueError(f"line {number}: {RULE}")
    return tuple(SecretStr(key) for _, key in keys)


def others_can_read(path: Path) -> bool:
    """Returns whether every user of the machine can read a file."""
    return bool(path.stat().st_mode & stat.S_IROTH)


def _is_key(text: str) -> bool:
    return len(text) >= MIN_KEY_CHARS and all("\x21" <= char <= "\x7e" for char in text)

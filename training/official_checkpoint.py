"""Reading of a checkpoint of the paper's code, without running code from the file.

The paper's code (github.com/facebookresearch/adaptive-span, utils.py) saves a dict of weights under "model". The states
of its optimizer and log, which are also in the file, are ignored. Knows no names of weights.
"""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DATA_PARALLEL = "module."  # prefix of every name under torch's DataParallel and DistributedDataParallel


class OfficialCheckpointError(ValueError):
    """A file that cannot be imported; the message names the key or the error and says what is allowed."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, under the names of the official modules.

    Raises:
        OfficialCheckpointError: the file cannot be read, is damaged, needs to run code, or holds no such weights.
    """
    state = _unpickle(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        held = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else type(state).__name__
        raise OfficialCheckpointError(
            f"{path} holds {held or 'nothing'}; a checkpoint of the paper's code has its weights under 'model'"
        )
    model: dict[Any, Any] = state["model"]
    for key, value in model.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise OfficialCheckpointError(f"{path}: {key} is not a plain tensor of floating point numbers")
    if all(key.startswith(_DATA_PARALLEL) for key in model):
        return {key.removeprefix(_DATA_PARALLEL): value for key, value in model.items()}
    return model


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        and value.layout is torch.strided
        and value.device.type == "cpu"
    )


def _unpickle(path: Path) -> Any:
    """The object that torch saved at `path`; it must consist of tensors and plain values."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise OfficialCheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old files; the warnings do not help the user
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except pickle.UnpicklingError as error:
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise OfficialCheckpointError(
                f"{path} asks for {foreign[1]}, and a checkpoint of tensors needs no such code; nothing was run"
            ) from error
        raise _damaged(path) from error
    except Exception as error:  # torch raises half a dozen types for a damaged file, OSError too
        raise _damaged(path) from error


def _can_be_mapped(path: Path) -> bool:
    """Whether the file can be mapped into memory: an uncompressed zip (torch >= 1.6). Verifies the zip's checksums."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise _damaged(path)
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _damaged(path: Path) -> OfficialCheckpointError:
    return OfficialCheckpointError(f"{path} is not a checkpoint of torch, or is damaged or cut short; copy it again")

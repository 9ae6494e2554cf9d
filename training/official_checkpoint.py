"""A checkpoint file of the paper's own code, read without running anything in it.

That code (github.com/facebookresearch/adaptive-span, utils.py) saves a dict of weights under "model", beside the states
of its optimizer and log, which are not looked at. Knows no names of weights.
"""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DATA_PARALLEL = "module."  # what torch's DataParallel and DistributedDataParallel put before every name


class OfficialCheckpointError(ValueError):
    """A file that cannot be imported; the message names the key or the fault and says what is allowed."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint under the names of the official modules; optimizer and logs are not looked at.

    Raises:
        OfficialCheckpointError: the file cannot be read, is damaged, would have to run code, or holds no such weights.
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
    """What torch saved at `path`, if it is tensors and plain values."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise OfficialCheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has several for old files, none for whoever imports them
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except pickle.UnpicklingError as error:
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise OfficialCheckpointError(
                f"{path} asks for {foreign[1]}, and a checkpoint of tensors needs no such code; nothing was run"
            ) from error
        raise _damaged(path) from error
    except Exception as error:  # torch raises half a dozen types for a file that is not whole, OSError too
        raise _damaged(path) from error


def _can_be_mapped(path: Path) -> bool:
    """True for the zip that torch has written since 1.6; its check sums, which torch does not compare, are checked."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise _damaged(path)
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _damaged(path: Path) -> OfficialCheckpointError:
    return OfficialCheckpointError(f"{path} is not a checkpoint of torch, or is damaged or cut short; copy it again")

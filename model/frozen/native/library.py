"""The compiled library in Python: the types of its functions, and the variants that this machine can run.

Owns the use of ctypes; knows no model.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from model.frozen.native.build import KERNELS, NativeError, build, variants

VARIANTS = tuple(KERNELS)
WEIGHTS = ("float32", "bfloat16", "int8", "int4")  # in the order of `WeightKind`
PARTS = (  # in the order of `Part`
    "embedding",
    "into",
    "query_key_value",
    "persistent_key",
    "persistent_value",
    "log_mass",
    "out",
    "norm_weight",
    "norm_bias",
    "position",
    "output",
    "output_bias",
    "narrow",
    "tail",
    "tail_bias",
)
DRAW = np.dtype([("temperature", "<f4"), ("unused", "<f4"), ("seed", "<u8"), ("position", "<i8")])  # the struct `Draw`


class Shape(ctypes.Structure):
    """The struct `Shape` of native.h."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            "num_layers",
            "width",
            "num_heads",
            "head_size",
            "num_persistent",
            "vocab_size",
            "weights",
            "rings",
            "output",
            "mask_empty",
            "num_clusters",
            "num_threads",
            "variant",
        )
    )


def open_library(path: Path) -> ctypes.CDLL:
    """Load a shared library. Raises NativeError if it does not load."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        advice = "delete it and run python -m model.frozen.native.build"
        raise NativeError(f"{path} does not load ({error}): {advice}") from None


@cache
def load_library() -> ctypes.CDLL:
    """Load the library, and compile it before if it is missing.

    Raises:
        NativeError: it cannot be built or does not load.
    """
    library = open_library(build())
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    signatures: dict[str, tuple[type | None, tuple[type, ...]]] = {
        "can_run": (i32, (i32,)),
        "open": (pointer, (pointer, pointer, pointer, pointer)),
        "close": (None, (pointer,)),
        "set": (i32, (pointer, i32, i32, i32, pointer)),
        "row_bytes": (i64, (pointer,)),
        "weight_bytes": (i64, (pointer,)),
        "reserve": (i32, (pointer, i64)),
        "decode": (i64, (pointer,) * 5 + (i64,) + (pointer,) * 5 + (i32,)),
        "extend": (i64, (pointer, pointer, i64, pointer, i64, pointer, pointer, i64, pointer)),
        "logits": (None, (pointer, pointer, i64, pointer)),
        "draw": (None, (pointer, pointer, i64, pointer, pointer, pointer)),
        "score": (i64, (pointer, pointer, i64) + (pointer,) * 4),
        "commit": (None, (pointer, pointer, i64, pointer, i64, i64)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"allattn_{name}")
        function.restype, function.argtypes = result, arguments
    return library


@cache
def runnable_variants() -> tuple[str, ...]:
    """Return the variants that processor and operating system can run, the fastest last.

    Raises:
        NativeError: as for `load_library`.
    """
    library = load_library()
    return tuple(name for name in variants() if library.allattn_can_run(VARIANTS.index(name)))


def choose_variant(name: str = "auto") -> str:
    """Return the variant to run: `name`, or for `auto` the fastest.

    Raises:
        NativeError: there is no such variant, or this machine cannot run it.
    """
    runnable = runnable_variants()
    if name == "auto":
        return runnable[-1]
    if name not in runnable:
        raise NativeError(f"native variant {name!r} cannot run here; allowed: auto, {', '.join(runnable)}")
    return name


def check_choice(value: str, *, what: str, allowed: Sequence[str]) -> int:
    """Return the index of a value among the allowed ones. Raises NativeError if it is not allowed."""
    if value not in allowed:
        raise NativeError(f"{what} {value!r} is unknown to the native step; allowed: {', '.join(allowed)}")
    return allowed.index(value)

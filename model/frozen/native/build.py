"""Compiles the native step with the system's C++ compiler: `python -m model.frozen.native.build`.

The kernels are compiled once for each variant of the processor's family; loading a model chooses the variant that
runs. The library's name holds a digest of its sources, so a stale library is never loaded.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.backends import AUTO, LoadOptions

HERE = Path(__file__).parent
NVIDIA_DEVICE = Path("/dev/nvidiactl")
UNITS = ("pool", "processor", "model", "open", "step")  # compiled once, for any processor of the family
# GCC 12 warns of undefined lanes in its own AVX-512 header; the last two flags silence that.
AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-uninitialized -Wno-maybe-uninitialized"
KERNELS = {  # compiler flags of each variant, in the order of `Variant` in kernels.h
    "generic": "",
    "avx2": "-mavx2 -mfma",
    "avx512": AVX512,
    "avx512_vnni": f"{AVX512} -mavx512vnni",
    "amx": f"{AVX512} -mavx512vnni -mamx-tile -mamx-int8 -mamx-bf16",
}
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Wno-unknown-warning-option"),
)
COMPILERS = ("c++", "g++", "clang++")


class NativeError(ValueError):
    """The native step cannot be built, loaded or used as asked; the message says why and what is allowed."""


def variants() -> tuple[str, ...]:
    """Return the variants that are compiled for this processor's family."""
    return tuple(KERNELS) if platform.machine() in ("x86_64", "AMD64") else ("generic",)


def library_path() -> Path:
    """Return the path of the library of these sources, whether it is built or not."""
    digest = hashlib.sha256(repr((FLAGS, KERNELS)).encode())
    for source in sorted((*HERE.glob("*.cpp"), *HERE.glob("*.h"))):
        digest.update(source.name.encode() + source.read_bytes())
    return HERE / f"liballattn-{platform.machine()}-{digest.hexdigest()[:12]}.so"


def suits(options: LoadOptions) -> bool:
    """Return whether `auto` means the native step: its library is built, and the options use no GPU."""
    uses_gpu = options.device == "cuda" or (options.device == AUTO and NVIDIA_DEVICE.exists())
    return not uses_gpu and library_path().is_file()


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler: $CXX, the system's compiler, or zig from PyPI.

    Raises:
        NativeError: there is no compiler.
    """
    if named := os.environ.get("CXX"):
        return named.split()
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang") is None:
        raise NativeError(
            f"no C++ compiler found ({', '.join(COMPILERS)}): the native step cannot be built, and torch serves "
            "several times slower; apt-get install g++, or pip install ziglang"
        )
    return [sys.executable, "-m", "ziglang", "c++"]


def build(*, force: bool = False) -> Path:
    """Compile the library if it is missing, remove older versions of it, and return its path.

    Raises:
        NativeError: there is no compiler, or the compiler fails.
    """
    target = library_path()
    if target.exists() and not force:
        return target
    compiler = find_compiler()
    with tempfile.TemporaryDirectory(dir=HERE, prefix="build-") as scratch:
        folder = Path(scratch)
        commands = [[*FLAGS, "-c", str(HERE / f"{unit}.cpp"), "-o", str(folder / f"{unit}.o")] for unit in UNITS]
        for name in variants():
            flags = [*FLAGS, *KERNELS[name].split(), f"-DVARIANT={name}"]
            commands.append([*flags, "-c", str(HERE / "kernels.cpp"), "-o", str(folder / f"{name}.o")])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda command: _run([*compiler, *command]), commands))
        objects = sorted(map(str, folder.glob("*.o")))
        _run([*compiler, "-shared", "-pthread", *objects, "-o", str(folder / target.name)])
        (folder / target.name).replace(target)
    for old in HERE.glob("liballattn-*.so"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NativeError(f"the C++ compiler failed: {' '.join(command)}\n{done.stderr[:4000]}")


def main() -> int:
    """Build the library and print its path; return the exit status."""
    try:
        print(build(force="--force" in sys.argv))
    except NativeError as error:
        print(f"allattn: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

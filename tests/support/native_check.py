"""Compile native_check.cpp and the native step under sanitizers and run it: `make check-native`.

python tests/support/native_check.py [address,undefined] [thread]
"""

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.frozen.native.build import FLAGS, HERE, KERNELS, UNITS, find_compiler, variants

PROGRAM = Path(__file__).with_suffix(".cpp")


def compile_program(folder: Path, sanitizers: str) -> Path:
    """Compile the program, which contains the whole native step, and return its path."""
    compiler = find_compiler()
    flags = [*FLAGS, "-Werror", "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{HERE}"]
    sources = [(HERE / f"{unit}.cpp", "", unit) for unit in UNITS] + [(PROGRAM, "", "program")]
    sources += [(HERE / "kernels.cpp", f"{KERNELS[name]} -DVARIANT={name}", name) for name in variants()]
    commands = [
        [*compiler, *flags, *extra.split(), "-c", str(source), "-o", str(folder / f"{name}.o")]
        for source, extra, name in sources
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    objects = [str(path) for path in sorted(folder.glob("*.o"))]
    subprocess.run([*compiler, *flags, *objects, "-o", str(folder / "program")], check=True)
    return folder / "program"


def main() -> None:
    """Run each group of sanitizers in turn; stop at the first group that finds an error."""
    for sanitizers in sys.argv[1:] or ["address,undefined", "thread"]:
        with tempfile.TemporaryDirectory() as scratch:
            program = compile_program(Path(scratch), sanitizers)
            print(sanitizers, flush=True)
            if subprocess.run([program]).returncode:
                sys.exit(f"{sanitizers}: failed")


if __name__ == "__main__":
    main()

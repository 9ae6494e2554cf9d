"""Compare all backends: speed, size of state and files, time to start, and loss on a text, in one table.

    python -m benchmarks.backends --text TEST.TXT [--bundles bundles/default paper] [--repeats 7] [--keep DIR]

Each bundle is exported to every format into DIR (deleted afterwards unless --keep names it). Each row of the table runs
`benchmarks.decode` and starts a server, in separate processes, because the threads of torch and of ONNX Runtime disturb
each other within a process. Prints a Markdown table, then one JSON line for each row.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.paper import PAPER, write_paper_bundle
from export.run import FORMATS

ROOT = Path(__file__).parents[1]
STARTS = 3
Row = dict[str, Any]


def rows_of(bundle: Path, artefacts: Path, formats: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """For each row of the table of a bundle, the folder to serve and the flags."""
    yield bundle, ["--dtype", "float32"]
    yield bundle, ["--dtype", "bfloat16"]
    for form in formats:
        out = artefacts / f"{bundle.name}-{form}"
        if not out.exists():
            run("export.run", str(bundle), str(out), "--format", form, "--num-bytes", "20000")
        yield out, []


def run(module: str, *args: str) -> str:
    """Run a module and return its output."""
    done = subprocess.run(
        [sys.executable, "-m", module, *args], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True
    )
    return done.stdout


def start_seconds(served: Path, flags: list[str]) -> float:
    """Median seconds from the start of a server to its banner."""
    times = []
    for _ in range(STARTS):
        begun = time.monotonic()
        command = [sys.executable, "-m", "server", "--bundle", str(served), "--port", "0", *flags]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            assert server.stdout is not None
            server.stdout.readline()
            times.append(time.monotonic() - begun)
            server.send_signal(signal.SIGTERM)
    return statistics.median(times)


def file_bytes(served: Path) -> int:
    """Size of the files that the server reads, which excludes pictures."""
    return sum(file.stat().st_size for file in served.iterdir() if file.is_file())


def measure(served: Path, flags: list[str], args: argparse.Namespace) -> Row:
    """One row of the table."""
    flags_of_row = ["--bundle", str(served), "--repeats", str(args.repeats), "--text", str(args.text), *flags]
    found: Row = json.loads(run("benchmarks.decode", *flags_of_row).splitlines()[-1])
    found["file_bytes"] = file_bytes(served)
    found["start_s"] = round(start_seconds(served, flags), 1)
    return {**found, "benchmark": "backends", "model": served.name}


def table(rows: list[Row]) -> str:
    """The Markdown table; speeds are tokens per second of all rows, in brackets the share of the possible speed."""
    lines = [
        "| backend | weights | state a stream | files | start | batch 1 | batch 8 | batch 32 | bits per byte |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speeds = [f"{batch['tokens_per_s']} ({batch['share'] * 100:.0f} %)" for batch in row["batches"]]
        state, files = row["state_bytes_per_row"] / 1e6, row["file_bytes"] / 1e6
        cells = [row["backend"], row["weights"], f"{state:.2f} MB", f"{files:.1f} MB", f"{row['start_s']:.1f} s"]
        lines.append(f"| {' | '.join([*cells, *speeds])} | {row['bits_per_byte']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every row and print the table and the JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundles", nargs="+", default=["bundles/default", PAPER], help="`paper`: 39 M, random")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--text", type=Path, required=True, help="of which the first 100 kB are scored")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--keep", type=Path, help="folder for the artefacts; what lies there is used")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.bundles:
            bundle = Path(name)
            if name == PAPER and not (bundle := folder / PAPER).exists():
                write_paper_bundle(bundle)
            todo = list(rows_of(bundle, folder, args.formats))
            rows = [measure(served, flags, args) for served, flags in tqdm(todo, desc=str(name), unit="row")]
            print(f"\n{name}, {rows[0]['parameters'] / 1e6:.1f} M parameters\n\n{table(rows)}\n")
            for row in rows:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

"""Measures a server under load, and how cost grows with the work, on the bundled model; draws the plots of both.

    python -m benchmarks.load                 # both parts, some five minutes on two cores
    python -m benchmarks.load workloads
    python -m benchmarks.load growth
    python -m benchmarks.load workloads --url http://127.0.0.1:30000 --folder build/load   # on a running server
    python -m benchmarks.load --report-only   # tables and plots of the rows that are there

Rows go to benchmarks/results/load.jsonl and growth.jsonl (written when a part is complete), plots beside them. Each
cell is one run of the body of `losa bench` against a server that is started for it, so `losa bench` with the settings
in a row repeats it. Prompts are text in the bundled model's language; answers have a fixed length and number of steps.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.load import plots, tables
from benchmarks.load.bench import run
from benchmarks.load.cells import Stand, growth, workloads
from losa_runtime.core.errors import LosaError

CHECKPOINT = Path(__file__).parents[1] / "tiny_model" / "checkpoint"
RESULTS = Path(__file__).parents[1] / "results"
FILES = {"workloads": "load.jsonl", "growth": "growth.jsonl"}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = _arguments(argv)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 150)
    stands: dict[str, list[Stand]] = {
        "workloads": workloads(0.25 if args.quick else 1.0),
        "growth": growth((1024, 8192)) if args.quick else growth(),
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    try:
        for part in args.parts or FILES:
            file = args.folder / FILES[part]
            if not args.report_only:
                write(file, run(str(args.model), stands[part], console, args.url))
            rows[part] = read(file)
    except (LosaError, FileNotFoundError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    _report(rows, args.folder, console)
    return 0


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the file when all rows are there; until then they stand in a file beside it, .new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    with new.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
    new.replace(file)


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def _report(rows: dict[str, list[dict[str, Any]]], folder: Path, console: Console) -> None:
    summary: dict[str, Any] = {}
    if "workloads" in rows:
        tables.workloads(rows["workloads"], console)
        plots.latencies(rows["workloads"], folder / "load_latency.png")
        summary |= {"host_share_at_32": tables.host_share(rows["workloads"])}
    if "growth" in rows:
        tables.growth(rows["growth"], console)
        plots.growth(rows["growth"], folder / "load_growth.png")
        summary |= {"losa_over_dense": tables.ratios(rows["growth"])}
    print(json.dumps(summary))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(FILES)} (default: all)")
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--url", help="of a running server of that model, for the workloads (default: start servers)")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where rows and plots go")
    parser.add_argument("--quick", action="store_true", help="few requests and short contexts, under a minute")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    unknown = [part for part in args.parts if part not in FILES]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(FILES)}")
    if args.url and args.parts != ["workloads"]:
        parser.error("--url: growth needs servers of its own; allowed with: workloads")
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the server would outlive this process
    sys.exit(main())

"""`python -m benchmarks.drills`: run drills, print what was found against the goals; the last line is JSON.

Exit code 1 if a goal was missed. Times are those of this machine while nothing else runs on it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.drills.drills import DRILLS
from benchmarks.drills.figures import Figure, worst
from benchmarks.result_file import add_row, circumstances


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drills", description=__doc__)
    parser.add_argument("drills", nargs="*", metavar="DRILL", help=f"some of {', '.join(DRILLS)} (default: all)")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each; the worst figures count")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="add the JSON row to this file")
    args = parser.parse_args()
    unknown = [name for name in args.drills if name not in DRILLS]
    if unknown:
        parser.error(f"there is no drill {unknown[0]!r}; there are {', '.join(DRILLS)}")
    console = Console()
    found: dict[str, list[Figure]] = {}
    for name in args.drills or DRILLS:
        with console.status(name):
            found[name] = worst([DRILLS[name]() for _ in range(args.repeat)])
        console.print(_table(name, found[name]))
    met = all(figure.met for figures in found.values() for figure in figures)
    row: dict[str, Any] = {
        "benchmark": "drills",
        "repeat": args.repeat,
        "met": met,
        "drills": {name: {f.name: round(f.value, 3) for f in figures} for name, figures in found.items()},
        **circumstances(torch.device("cpu")),
    }
    if args.output is not None:
        add_row(args.output, row)
    print(json.dumps(row))
    return 0 if met else 1


def _table(name: str, figures: list[Figure]) -> Table:
    table = Table("figure", "worst seen", "goal", "", title=name, title_justify="left")
    for figure in figures:
        unit = "" if figure.exact else " s"
        value = f"{figure.value:.0f}" if figure.exact else f"{figure.value:.3f}{unit}"
        goal = "" if figure.at_most is None else f"at most {figure.at_most:g}{unit}"
        table.add_row(figure.name.removesuffix("_s"), value, goal, "✓" if figure.met else "✗")
    return table


if __name__ == "__main__":
    sys.exit(main())

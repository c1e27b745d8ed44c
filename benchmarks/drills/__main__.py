"""`python -m benchmarks.drills`: run drills, print what was found against the goals; the last line is JSON.

Exit code 1 if a goal was missed. Times are those of this machine while nothing else runs on it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.drills.drills import DRILLS
from benchmarks.drills.figures import Figure, worst
from benchmarks.result_file import circumstances, keep_row


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drills", description=__doc__)
    parser.add_argument("drills", nargs="*", metavar="DRILL", help=f"some of {', '.join(DRILLS)} (default: all)")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each; the worst figures count")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="keep a row of each there, in place of its last one"
    )
    args = parser.parse_args()
    unknown = [name for name in args.drills if name not in DRILLS]
    if unknown:
        parser.error(f"there is no drill {unknown[0]!r}; there are {', '.join(DRILLS)}")
    console = Console()
    rows = []
    for name in args.drills or DRILLS:
        about = circumstances(torch.device("cpu"))  # before: the load is that of others
        with console.status(name):
            figures = worst([DRILLS[name]() for _ in range(args.repeat)])
        console.print(_table(name, figures))
        row = {
            "benchmark": f"drill {name}",
            "repeat": args.repeat,
            "met": all(figure.met for figure in figures),
            "figures": {f.name: round(f.value, 3) for f in figures},
            **about,
        }
        rows.append(row)
        if args.record is not None:
            keep_row(args.record, row)
    met = all(row["met"] for row in rows)
    print(json.dumps({"benchmark": "drills", "met": met, "drills": {r["benchmark"]: r["figures"] for r in rows}}))
    return 0 if met else 1


def _table(name: str, figures: list[Figure]) -> Table:
    table = Table("figure", "worst seen", "goal", "", title=name, title_justify="left")
    for figure in figures:
        value = f"{figure.value:,.0f}" if figure.exact else f"{figure.value:,.3f}{figure.unit}"
        goal = "" if figure.at_most is None else f"at most {figure.at_most:g}{figure.unit}"
        table.add_row(figure.title, value, goal, "✓" if figure.met else "✗")
    return table


if __name__ == "__main__":
    sys.exit(main())

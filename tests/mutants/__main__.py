"""`python -m tests.mutants`: plants each bug of the table in a copy of the sources and runs its test.

Prints who was found and who survived; exit code 1 if one survived, or if a test fails without any bug.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.result_file import circumstances, keep_row
from tests.mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "__pycache__", ".*_cache", ".hypothesis", "results", "runs"
)
LIMIT_S = 600


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, or those whose names contain one of the words; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutants whose names contain one of these")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep the figures there, in place of the last ones")
    args = parser.parse_args(argv)
    words = args.words
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    if not chosen:
        parser.error(f"no mutant is named like that; there are: {'; '.join(m.name for m in MUTANTS)}")
    console = Console()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "sources"
        shutil.copytree(ROOT, copy, ignore=LEFT_BEHIND)
        tests = sorted({mutant.test for mutant in chosen})
        console.print(f"{len(chosen)} mutants, {len(tests)} tests; first without any bug")
        for test in tests:
            code, output = run(copy, test)
            if code != 0:
                console.print(output[-3000:], markup=False)
                console.print(f"[bold red]{test} fails without a bug: its failing with one shows nothing[/]")
                return 1
        results = [(mutant, *judge(copy, mutant)) for mutant in chosen]
    survivors = show(console, results)
    if args.record is not None:
        keep(args.record, results)
    return 1 if survivors else 0


def keep(path: Path, results: Sequence[tuple[Mutant, bool, float]]) -> None:
    """Keep the figures of a run."""
    row: dict[str, Any] = {
        "benchmark": "planted bugs",
        "planted": len(results),
        "found": sum(found for _, found, _ in results),
        "survived": [mutant.name for mutant, found, _ in results if not found],
        "seconds": round(sum(seconds for _, _, seconds in results)),
    }
    keep_row(path, {**row, **circumstances(torch.device("cpu"))})


def judge(copy: Path, mutant: Mutant) -> tuple[bool, float]:
    """(found, seconds)."""
    file = copy / mutant.file
    source = file.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.file}: the line of {mutant.name!r} is not there once"
    file.write_text(source.replace(mutant.old, mutant.new))
    began = time.monotonic()
    try:
        code, output = run(copy, mutant.test, "-x")
    finally:
        file.write_text(source)
    # 1: tests failed. Anything else means that nothing was tested.
    assert code in (0, 1), f"{mutant.name}: pytest ended with {code}: {output[-3000:]}"
    return code == 1, time.monotonic() - began


def run(copy: Path, test: str, *options: str) -> tuple[int, str]:
    """pytest in the copy: (exit code, output); 124 if it took too long. Of a file its fast tests only."""
    environment = {**os.environ, "PYTHONPATH": ":".join(str(copy / part) for part in ("", "kernels", "server"))}
    marks = "not soak" if "::" in test else "not slow and not soak"
    fixed = ["-q", "-p", "no:cacheprovider", "-p", "tests.mutants.unshrunk", "-o", "addopts=", "-W", "ignore"]
    command = [sys.executable, "-P", "-m", "pytest", *fixed, "-m", marks, *options, test]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, f"more than {LIMIT_S} s"
    return done.returncode, done.stdout + done.stderr


def show(console: Console, results: Sequence[tuple[Mutant, bool, float]]) -> int:
    """Print the table; how many survived."""
    table = Table(title="planted bugs")
    for column in ("bug", "in", "found by", "", "s"):
        table.add_column(column, overflow="fold", justify="right" if column == "s" else "left")
    for mutant, found, seconds in results:
        file, _, test = mutant.test.partition("::")
        verdict = "[green]found[/]" if found else "[bold red]SURVIVED[/]"
        where, by = mutant.file.removeprefix("server/"), test or file.removeprefix("tests/")
        table.add_row(mutant.name, where, by, verdict, f"{seconds:.1f}")
    console.print(table)
    survivors = sum(not found for _, found, _ in results)
    console.print(f"{len(results) - survivors} of {len(results)} found")
    return survivors


if __name__ == "__main__":
    sys.exit(main())

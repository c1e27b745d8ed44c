"""Compares every sparse method on the bundled model, paired on the same seeded samples.

    python -m benchmarks.quality --samples 100
    python -m benchmarks.quality --quick

Rows go to benchmarks/results/quality.jsonl as they are measured; cells that are already there are not measured again.
Tables, claims (beside it, _claims.json) and the plot (_pareto.png) are of the rows that the options ask for.
Blocks are denoised in a fixed number of steps (--steps), because the bundled model is sure of most answers at once and
would leave nothing to later, sparse steps; --adaptive decodes by confidence instead. --quick starts afresh, in build/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.quality.claims import judge
from benchmarks.quality.measure import fill, grid, rows
from benchmarks.quality.plots import pareto
from benchmarks.quality.report import tables, verdicts, write_claims
from benchmarks.quality.rows import Row, RowFile, Samples
from benchmarks.quality.runner import Runner
from benchmarks.quality.samples import TASKS
from benchmarks.quality.settings import BUDGET_SHARES, Decoding, names, settings

CHECKPOINT = Path(__file__).parents[1] / "tiny_model" / "checkpoint"
RESULTS = Path(__file__).parents[1] / "results"
QUICK = Path(__file__).parents[2] / "build" / "quality" / "quality.jsonl"
PAGE_SIZE = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = _arguments(argv)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 150)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.out.unlink(missing_ok=True)
    file = RowFile(args.out)
    samples = Samples(
        decoding=Decoding(None if args.adaptive else args.steps),
        samples=args.samples,
        per_document=args.per_document,
        seed=args.seed,
        page_size=PAGE_SIZE,
    )
    runner = Runner(str(args.model), max(args.contexts), PAGE_SIZE)
    wanted = {context: settings(args.methods, context, args.budgets, PAGE_SIZE) for context in args.contexts}
    batches = grid(runner, wanted, args.tasks, samples)
    if not args.report_only:
        console.print(f"{fill(runner, file, batches, samples, console)} new rows in {args.out}")
    _report(rows(file, batches), args.out, console)
    return 0


def _report(found: Sequence[Row], out: Path, console: Console) -> None:
    """Tables, plot and claims of the rows that this run asked for."""
    if not found:
        console.print("There are no rows to report on.")
        return
    tables(found, console)
    claims = judge(found)
    verdicts(claims, console)
    write_claims(claims, out.with_name(f"{out.stem}_claims.json"))
    pareto(found, out.with_name(f"{out.stem}_pareto.png"))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=CHECKPOINT)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="prompt tokens")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=names(), default=names())
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGET_SHARES), help="shares of the context")
    parser.add_argument("--samples", type=int, default=100, help="questions per cell")
    parser.add_argument("--per-document", type=int, default=4, help="questions per document")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps per block (1 to 16)")
    parser.add_argument("--adaptive", action="store_true", help="as many steps as the confidence rule takes")
    parser.add_argument("--seed", type=int, default=0, help="of the documents")
    parser.add_argument("--threads", type=int, default=None, help="default: what torch would take")
    parser.add_argument("--quick", action="store_true", help="a small grid, under two minutes on two cores")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, report on what is in the file")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/quality.jsonl")
    args = parser.parse_args(argv)
    if args.quick:
        args.contexts, args.tasks, args.budgets, args.samples = [1024], ["multi_value", "late_key"], [0.03, 0.12], 8
    if args.out is None:
        args.out = QUICK if args.quick else RESULTS / "quality.jsonl"
    return args


if __name__ == "__main__":
    sys.exit(main())

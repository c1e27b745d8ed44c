"""Compares every sparse method on the bundled model, paired on the same seeded samples.

    python -m benchmarks.quality --samples 100
    python -m benchmarks.quality --quick
    python -m benchmarks.quality --ablations

Rows go to benchmarks/results/quality.jsonl as they are measured; cells that are already there are not measured again.
Tables, claims (beside it, _claims.json) and the plot (_pareto.png) are of the rows that the options ask for.
Blocks are denoised in a fixed number of steps (--steps), because the bundled model is sure of most answers at once and
would leave nothing to later, sparse steps; --adaptive decodes by confidence instead. --quick starts afresh, in build/.

Time of a cell of 100 answers on one core: about 4 s at 2K tokens, 5 s at 4K, 9 s at 8K, 19 s at 16K, and there are 54
cells per task and context; at 16K the task `single` takes twice as long, as it needs a document per question. Runs for
different contexts may share a file; on a busy machine OMP_NUM_THREADS=1 is much faster than two threads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.quality import ablations
from benchmarks.quality.claims import judge
from benchmarks.quality.measure import fill, grid, rows
from benchmarks.quality.plots import pareto
from benchmarks.quality.report import tables, verdicts, write_claims
from benchmarks.quality.rows import Row, RowFile, Samples
from benchmarks.quality.runner import Runner
from benchmarks.quality.samples import TASKS
from benchmarks.quality.settings import BUDGET_SHARES, Decoding, Setting, names, settings

CHECKPOINT = Path(__file__).parents[1] / "tiny_model" / "checkpoint"
RESULTS = Path(__file__).parents[1] / "results"
QUICK = Path(__file__).parents[2] / "build" / "quality" / "quality.jsonl"
PAGE_SIZE = 16
CONTEXTS = (2048, 4096, 8192, 16384)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = _arguments(argv)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 150)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.out.unlink(missing_ok=True)
    file = RowFile(args.out)
    found = [row for page_size, wanted in _jobs(args) for row in _run(args, file, page_size, wanted, console)]
    _report(found, args, console)
    return 0


def _jobs(args: argparse.Namespace) -> Iterator[tuple[int, dict[int, list[Setting]]]]:
    """What each engine is asked, by its page size: settings per context."""
    if not args.ablations:
        yield PAGE_SIZE, {n: settings(args.methods, n, args.budgets, PAGE_SIZE) for n in args.contexts}
        return
    chosen = (args.methods, args.budgets)
    yield PAGE_SIZE, {n: ablations.settings(n, PAGE_SIZE, *chosen) for n in args.contexts}
    if set(args.methods) & set(ablations.OF_PAGES):
        for page_size in ablations.PAGE_SIZES:
            yield page_size, {n: ablations.settings_of_pages(n, page_size, *chosen) for n in args.contexts}


def _run(
    args: argparse.Namespace, file: RowFile, page_size: int, wanted: dict[int, list[Setting]], console: Console
) -> list[Row]:
    """Measure what the file lacks; the rows of all that is wanted and there."""
    samples = Samples(
        decoding=Decoding(None if args.adaptive else args.steps),
        samples=args.samples,
        per_document=args.per_document,
        seed=args.seed,
        page_size=page_size,
    )
    runner = Runner(str(args.model), max(args.contexts), page_size, by_name=args.ablations)
    batches = grid(runner, wanted, args.tasks, samples)
    if not args.report_only:
        console.print(f"{fill(runner, file, batches, samples, console)} new rows in {args.out}")
    return rows(file, batches)


def _report(found: Sequence[Row], args: argparse.Namespace, console: Console) -> None:
    """Tables, plot and claims of the rows that this run asked for."""
    if not found:
        console.print("There are no rows to report on.")
    elif args.ablations:
        ablations.table(found, console)
    else:
        tables(found, console)
        claims = judge(found)
        verdicts(claims, console)
        write_claims(claims, args.out.with_name(f"{args.out.stem}_claims.json"))
        pareto(found, args.out.with_name(f"{args.out.stem}_pareto.png"))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=CHECKPOINT)
    parser.add_argument("--contexts", type=int, nargs="+", default=None, help=f"prompt tokens, default: {CONTEXTS}")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=None, help="default: all")
    parser.add_argument("--methods", nargs="+", choices=names(), default=names())
    parser.add_argument("--budgets", type=float, nargs="+", default=None, help="shares of the context")
    parser.add_argument("--samples", type=int, default=100, help="questions per cell")
    parser.add_argument("--per-document", type=int, default=4, help="questions per document")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps per block (1 to 16)")
    parser.add_argument("--adaptive", action="store_true", help="as many steps as the confidence rule takes")
    parser.add_argument("--seed", type=int, default=0, help="of the documents")
    parser.add_argument("--threads", type=int, default=None, help="default: what torch would take")
    parser.add_argument("--ablations", action="store_true", help="one choice of each method changed at a time instead")
    parser.add_argument("--quick", action="store_true", help="a small grid, under two minutes on two cores")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, report on what is in the file")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/quality.jsonl")
    args = parser.parse_args(argv)
    if args.quick:
        args.contexts, args.tasks, args.budgets, args.samples = [1024], ["multi_value", "late_key"], [0.03, 0.12], 8
    args.budgets = args.budgets or list(ablations.SHARES if args.ablations else BUDGET_SHARES)
    args.contexts = args.contexts or list(ablations.CONTEXTS if args.ablations else CONTEXTS)
    args.tasks = args.tasks or list(ablations.TASKS if args.ablations else TASKS)
    if args.out is None:
        name = "quality_ablations.jsonl" if args.ablations else "quality.jsonl"
        args.out = QUICK if args.quick else RESULTS / name
    return args


if __name__ == "__main__":
    sys.exit(main())

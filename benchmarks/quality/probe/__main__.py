"""Looks inside one block: what each method gets wrong, step by step, along a given sequence of tokens.

    python -m benchmarks.quality.probe --context 4096 --documents 8

Every method sees the same true tokens in the same steps (see `benchmarks.quality.scripts`): blocks of answers, and late
keys. Writes benchmarks/results/probe.json and pictures beside it: cloze perplexity against bytes, relative error per
step and layer, the union curve beside the paper's Figure 3, and how concentrated the changes between two steps are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.quality.__main__ import CHECKPOINT, PAGE_SIZE, RESULTS
from benchmarks.quality.probe.figures import Figures, Outcome, layer_changes, outcomes, union_curves
from benchmarks.quality.probe.locality import Changes
from benchmarks.quality.probe.play import Played, play, settle, walk
from benchmarks.quality.probe.plots import draw
from benchmarks.quality.probe.union import Choice, Unions
from benchmarks.quality.rows import commit, versions
from benchmarks.quality.runner import Runner
from benchmarks.quality.samples import LATE_KEY, documents
from benchmarks.quality.scripts import Script, answers, late_keys
from benchmarks.quality.settings import BUDGET_SHARES, Decoding, budgets, names, settings
from benchmarks.quality.stage import Stage

ACTIVE = 5  # LoSA's default for a block of 16
UNION_SHARES = (0.03, 0.1)  # of the context; the paper's largest budget is about a tenth of its prompts
ANSWER_TASK = "multi_value"  # the longest answers
_ROOM = 256  # tokens behind a document


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = _arguments(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 150)
    if args.report_only:
        figures = Figures.model_validate_json(args.out.read_text())
    else:
        figures = _measured(args, console)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(figures.model_dump_json(indent=1) + "\n")
    _tables(figures, console)
    for path in (args.out, *draw(figures, args.out)):
        console.print(f"written: {path}")
    return 0


def _measured(args: argparse.Namespace, console: Console) -> Figures:
    runner = Runner(str(args.model), args.context + _ROOM, PAGE_SIZE)
    figures = Figures(commit=commit(), versions=versions())
    scripts = _scripts(runner, args)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("blocks"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("", total=sum(map(len, scripts.values())))
        for kind, mine in scripts.items():
            progress.update(bar, description=kind)
            figures.scripts[kind] = len(mine)
            _probe(runner, kind, mine, args, figures, partial(progress.advance, bar))
    return figures


def _scripts(runner: Runner, args: argparse.Namespace) -> dict[str, list[Script]]:
    """Per kind, at most `per_document` blocks of each document."""
    parts = runner.llm.engine.parts
    encode, block = runner.llm.tokenizer.encode, runner.block_length
    end, fill = encode("<|im_end|>")[0], encode("<|endoftext|>")[0]
    found: dict[str, list[Script]] = {"answer": [], LATE_KEY: []}
    assert {end, fill} <= parts.eos_token_ids, "what stands behind an answer"
    count = args.documents * args.per_document
    for asked in documents(ANSWER_TASK, args.context, count, args.per_document, args.seed):
        found["answer"] += answers(asked, encode, block, end, fill)
    for asked in documents(LATE_KEY, args.context, count, args.per_document, args.seed):
        found[LATE_KEY] += late_keys(asked, encode, block)
    return found


def _probe(
    runner: Runner,
    kind: str,
    scripts: Sequence[Script],
    args: argparse.Namespace,
    figures: Figures,
    advance: Callable[[], None],
) -> None:
    """All figures of one kind of script."""
    chosen = settings(args.methods, args.context, args.budgets, PAGE_SIZE)
    resolved = [runner.resolve(setting, Decoding(args.steps)) for setting in chosen]
    [dense] = [params for params in resolved if params.method == "dense"]
    stage, changes = Stage(runner), Changes()
    unions = Unions(
        [Choice(b.tokens, h) for b in budgets(args.context, UNION_SHARES, PAGE_SIZE) for h in ("max", "none")]
    )
    played: list[Played] = []
    for script in scripts:
        stage.store(script.stored)
        revealed = settle(script, stage, dense, -(-stage.block // args.steps))
        changes.order = revealed.order
        walk(revealed, stage, dense, changes.note)
        walk(revealed, stage, dense, unions.note)
        played.append(play(revealed, stage, resolved))
        advance()
    figures.outcomes += outcomes(played, chosen, kind, args.context)
    figures.unions += union_curves(unions, kind, args.context)
    figures.changes += layer_changes(changes, kind, args.context, stage.layers, ACTIVE)


def _tables(figures: Figures, console: Console) -> None:
    for kind in dict.fromkeys(o.kind for o in figures.outcomes):
        mine = [o for o in figures.outcomes if o.kind == kind]
        table = Table(
            title=f"{kind}: {figures.scripts[kind]} blocks, {mine[0].tokens} scored tokens, {mine[0].context:,} tokens"
        )
        for name in (
            "method",
            "budget",
            "perplexity",
            "right",
            "error, prefix",
            "error, output",
            "bytes",
            "bytes, all steps",
        ):
            table.add_column(name, justify="left" if name == "method" else "right")
        for outcome in mine:
            table.add_row(outcome.name, *_cells(outcome))
        console.print(table)
    table = Table(
        "kind", "layer", "half of the change (query)", "key", "value", "just revealed among the 5", "by chance"
    )
    for c in figures.changes:
        half = [f"{c.half[what]:.1f} tokens" for what in ("query", "key", "value")]
        table.add_row(c.kind, str(c.layer), *half, f"{c.overlap:.0%}", f"{c.by_chance:.0%}")
    console.print(table)


def _cells(outcome: Outcome) -> list[str]:
    strength = (
        f"{outcome.share:.0%}" if outcome.share is not None else str(outcome.options.get("refresh_tokens", "all"))
    )
    errors = [_later(outcome.prefix_error), _later(outcome.output_error)]
    figures = [f"{outcome.perplexity:.3f}", f"{outcome.right:.0%}", *errors]
    return [strength, *figures, f"{outcome.bytes_ratio:.1%}", f"{outcome.block_bytes_ratio:.1%}"]


def _later(error: list[list[float]]) -> str:
    """Mean over later steps and layers."""
    later = [value for step in error[1:] for value in step]
    return f"{sum(later) / len(later):.3f}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=CHECKPOINT)
    parser.add_argument("--context", type=int, default=4096, help="tokens of a document with its question")
    parser.add_argument("--documents", type=int, default=8, help="per kind of block")
    parser.add_argument("--per-document", type=int, default=4, help="questions or facts per document")
    parser.add_argument("--methods", nargs="+", choices=names(), default=names())
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGET_SHARES), help="shares of the context")
    parser.add_argument("--steps", type=int, default=8, help="planned steps of a block")
    parser.add_argument("--seed", type=int, default=0, help="of the documents")
    parser.add_argument("--threads", type=int, default=None, help="default: what torch would take")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, draw what is in the file")
    parser.add_argument("--out", type=Path, default=RESULTS / "probe.json")
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(["dense", *args.methods]))  # everything is relative to it
    return args


if __name__ == "__main__":
    sys.exit(main())

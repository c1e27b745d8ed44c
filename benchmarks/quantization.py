"""What 8-bit weights of linear layers cost and save: answers, logits, memory and speed, without a GPU.

    python -m benchmarks.quantization [--parts bundled large] [--record]

bundled: the model that comes with the project: right answers to its retrieval tasks, logits of a block of masks against
those of the full weights, tokens per second of processor time. large: a checkpoint of random weights with the shape of
a released model: memory while it is loaded and behind, time of a forward; see `quantization_large`. Variants take
turns. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import quantization_bundled, quantization_large
from benchmarks.quantization_bundled import KINDS
from benchmarks.result_file import circumstances, keep_row
from benchmarks.tiny_model import corpus

RESULTS = Path(__file__).parent / "results" / "quantization.jsonl"
PARTS = ("bundled", "large")
MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit code."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[dict[str, Any]] = []
    with Progress(*columns, console=console, transient=True) as progress:
        if "bundled" in args.parts:
            bar = progress.add_task("bundled", total=quantization_bundled.ticks(args))
            rows.append(quantization_bundled.measure(args, lambda: progress.advance(bar)))
        if "large" in args.parts:
            bar = progress.add_task(args.preset, total=1 + len(KINDS) * len(args.dtypes))
            rows.append(quantization_large.measure(args, lambda: progress.advance(bar)))
    for row in rows:
        _say(console, row)
        if args.record:
            keep_row(RESULTS, row | circumstances(torch.device("cpu")))
    print(json.dumps(rows))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--context", type=int, default=2048, help="prompt tokens of the questions")
    parser.add_argument("--samples", type=int, default=50, help="questions per task")
    parser.add_argument("--tasks", nargs="+", default=list(corpus.TASKS), choices=corpus.TASKS)
    parser.add_argument("--logit-samples", type=int, default=10, help="documents per task whose logits are compared")
    parser.add_argument("--logit-context", type=int, default=512, help="their prompt tokens")
    parser.add_argument("--requests", type=int, default=8, help="how many are answered at once")
    parser.add_argument("--output-tokens", type=int, default=128, help="of each of them, where speed is measured")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs per variant, behind one that is not counted")
    parser.add_argument("--preset", default="0.6b", help="shape of the large checkpoint")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true", help=f"put the rows into {RESULTS.name}")
    return parser.parse_args(argv)


def _say(console: Console, row: dict[str, Any]) -> None:
    if row["benchmark"] == "bundled":
        console.print(_bundled_table(row))
    else:
        console.print(_large_table(row))


def _bundled_table(row: dict[str, Any]) -> Table:
    variants: dict[str, Any] = row["variants"]
    title = f"bundled model, {row['samples']} questions per task, {row['context']} tokens"
    table = Table("", *variants, title=title)

    def add(name: str, shown: Callable[[Any], str]) -> None:
        table.add_row(name, *map(shown, variants.values()))

    add("weights, MiB", lambda found: f"{found['weight_bytes'] / MIB:.1f}")
    for task in variants["none"]["right"]:
        add(f"right, {task}", lambda found, task=task: f"{found['right'][task]:.0%}")  # type: ignore[misc]
    add("error of logits, mean", lambda found: f"{found['logits']['mean_error']:.4f}")
    add("error of logits, max", lambda found: f"{found['logits']['max_error']:.3f}")
    add("spread of logits", lambda found: f"{found['logits']['spread']:.3f}")
    add("KL, nats", lambda found: f"{found['logits']['kl']:.1e}")
    add("other first choices", lambda found: f"{found['logits']['other_choices']:.1%}")
    add("tokens per CPU second", lambda found: f"{found['tokens_per_cpu_s']:.0f} ({found['speed']:.2f})")
    return table


def _large_table(row: dict[str, Any]) -> Table:
    table = Table(title=f"{row['preset']}, random weights, {row['threads']} thread(s)")
    rows = [f"{rows} rows, CPU s" for rows in quantization_large.ROWS]
    for name in ("dtype", "weights", "MiB", "process", "peak", "load, CPU s", *rows):
        table.add_column(name, justify="right")
    for found in row["variants"]:
        table.add_row(
            found["dtype"],
            found["kind"],
            f"{found['weight_bytes'] / MIB:,.0f}",
            f"{found['held_bytes'] / MIB:,.0f}",
            f"{found['peak_bytes'] / MIB:,.0f}",
            f"{found['load_cpu_s']:.1f}",
            *(f"{seconds:.3f}" for seconds in found["forward_s"].values()),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())

"""Measures the answers of a checkpoint through the runtime's offline face.

    python -m benchmarks.tiny_model.evaluate --context 2048 --json
    python -m benchmarks.tiny_model.evaluate --context 4096 --method losa --budget 256 --steps 8

Documents come from evaluation seeds, which training never draws. An answer counts only as a whole. The last line
printed is one JSON object, and with --json the only one. The bundled model is sure of most answers in a block's first
step, which LoSA reads densely; --steps fixes the number of denoising steps, so that the later, sparse ones decide.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.tiny_model import corpus

CHECKPOINT = Path(__file__).parent / "checkpoint"
NEW_TOKENS = 32


def prompts(task: str, context: int, samples: int) -> tuple[list[str], list[corpus.Question]]:
    """Chat prompts of one task and their questions."""
    pairs = [corpus.evaluation_task(task, context, sample) for sample in range(samples)]
    return [corpus.chat_prompt(text, question.text) for text, question in pairs], [q for _, q in pairs]


class Tally:
    """What a measurement has seen: right answers and, of sparse methods, the mean share of the prefix read."""

    def __init__(self) -> None:
        self.right = 0
        self.densities: list[float] = []

    @property
    def density(self) -> float | None:
        """Mean KV density of the later denoising steps; None if no answer needed one."""
        return round(sum(self.densities) / len(self.densities), 4) if self.densities else None


def measure(llm: Any, params: Any, task: str, args: argparse.Namespace, advance: Callable[[int], None]) -> Tally:
    """Answer one task's questions."""
    asked, questions = prompts(task, args.context, args.samples)
    tally = Tally()
    for at in range(0, args.samples, args.batch):
        outputs = llm.generate(asked[at : at + args.batch], params)
        for output, question in zip(outputs, questions[at : at + args.batch], strict=True):
            hit = output.text.strip() == question.answer
            tally.right += hit
            if output.stats.kv_density is not None:
                tally.densities.append(output.stats.kv_density)
            if not (hit or args.json):
                print(f"{task}: {question.text} expected {question.answer!r}, found {output.text!r}")
        advance(len(outputs))
    return tally


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--context", type=int, default=2048, help="prompt tokens")
    parser.add_argument("--samples", type=int, default=50, help="documents per task")
    parser.add_argument("--tasks", nargs="+", default=list(corpus.TASKS), choices=corpus.TASKS)
    parser.add_argument("--method", default="dense", help="sparse attention method of the runtime")
    parser.add_argument("--budget", type=int, default=None, help="tokens each query may attend to, for sparse methods")
    parser.add_argument("--batch", type=int, default=8, help="prompts handed over at once")
    parser.add_argument("--threshold", type=float, default=0.9, help="confidence from which a token is kept")
    parser.add_argument("--steps", type=int, default=None, help="fixed denoising steps per block (1 to 16)")
    parser.add_argument("--json", action="store_true", help="print the result line only")
    args = parser.parse_args()

    from losa_runtime import LLM, SamplingParams

    options: dict[str, Any] = {"sparse_method": args.method, "threshold": args.threshold}
    result: dict[str, Any] = {"context": args.context, "method": args.method}
    if args.budget is not None:
        result["budget"] = options["token_budget"] = args.budget
    if args.steps is not None:
        options |= {"algorithm": "low_confidence_static", "denoising_steps": args.steps}
        result["steps"] = args.steps
    llm = LLM(model=args.model, **options)
    params = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tallies: dict[str, Tally] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for task in args.tasks:
            bar = progress.add_task(task, total=args.samples)
            tallies[task] = measure(llm, params, task, args, partial(progress.advance, bar))
    result |= {"samples": args.samples, "tasks": {task: t.right / args.samples for task, t in tallies.items()}}
    if args.method != "dense":
        result["kv_density"] = {task: tally.density for task, tally in tallies.items()}
    if not args.json:
        table = Table("task", "right", "KV density", title=f"{args.context} tokens, {args.method}")
        for task, tally in tallies.items():
            table.add_row(
                task, f"{tally.right} of {args.samples}", "-" if tally.density is None else f"{tally.density:.1%}"
            )
        Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

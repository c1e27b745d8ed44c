"""Does `--sparse-min-context auto` keep its word? Requests over growing prefixes: dense, with the rule, and without it.

    python -m benchmarks.min_context --threads 1 --cpu-time

One engine with the rule, which it settles at its start. All prefixes are those of one document, read once; then, for
each length, the same request densely, with the method under the rule, and with the method always, in turn. The last
line is JSON; times are medians, and `worst` is the largest time with the rule relative to dense attention.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.result_file import add_row, circumstances
from benchmarks.tiny_model.corpus import chat_prompt, demo
from losa_runtime import LLM, SamplingParams
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.method import METHODS
from losa_runtime.sparse.min_context import MinContext

CHECKPOINT = Path(__file__).parent / "tiny_model" / "checkpoint"
KINDS = ("dense", "rule", "always")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time: allowed with --threads 1, so that all work is on this thread")
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    llm = LLM(
        model=str(args.model),
        sparse_method=args.method,
        token_budget=args.budget,
        sparse_methods=("dense", args.method),
        sparse_min_context="auto",
        algorithm="low_confidence_static",
        denoising_steps=args.steps,
        max_total_tokens=max(args.contexts) + 4096,
    )
    least = llm.engine.parts.least_prefix.table(llm.engine.config, llm.engine.parts.geometry)[args.method]
    text = chat_prompt(demo(max(args.contexts) + 64).text, "What?")
    ids = llm.tokenizer.encode(text)
    rows = []
    for context in sorted(args.contexts):
        with console.status(f"{context} tokens of prefix"):
            rows.append(_row(llm, ids[:context], args))
    worst = max(row["rule_over_dense"] for row in rows)
    console.print(_table(args, least, rows))
    result: dict[str, Any] = {"benchmark": "min_context", "method": args.method, "sparse_from": least, "worst": worst}
    result |= {name: getattr(args, name) for name in ("budget", "output", "steps", "rounds", "seconds", "threads")}
    backend = type(llm.engine.parts.runner.backend).__name__
    result |= {"clock": "processor" if args.cpu_time else "wall", "backend": backend}
    result["load_average"] = round(os.getloadavg()[0], 2)
    result["rows"] = rows
    if args.results is not None:
        add_row(args.results, result | circumstances(torch.device("cpu")))
    print(json.dumps(result))
    return 0


def _row(llm: LLM, prompt: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """The three kinds in turn, the first time untimed: it reads the prefix."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    engine, seconds = llm.engine, {kind: list[float]() for kind in KINDS}
    ruled = engine.parts
    free = ruled._replace(least_prefix=ruled.least_prefix._replace(rule=MinContext(0)))
    dense_steps, number, until = 0, 0, time.perf_counter() + args.seconds
    while number <= args.rounds or time.perf_counter() < until:
        for kind in KINDS:
            engine.parts = free if kind == "always" else ruled
            began = clock()
            [answer] = llm.generate([prompt], _params(args, "dense" if kind == "dense" else args.method))
            if number:
                seconds[kind].append(clock() - began)
            if kind == "rule":
                dense_steps = answer.stats.dense_steps
        number += 1
    engine.parts = ruled
    found = {kind: median(values) for kind, values in seconds.items()}
    return {
        "context": len(prompt),
        "rounds": number - 1,
        **{f"{kind}_tokens_per_s": round(args.output / value, 2) for kind, value in found.items()},
        "rule_over_dense": round(found["rule"] / found["dense"], 3),
        "always_over_dense": round(found["always"] / found["dense"], 3),
        "rule_chose": "dense" if dense_steps == args.output // 16 * args.steps else args.method,
    }


def _params(args: argparse.Namespace, method: str) -> SamplingParams:
    wish = DiffusionParams(sparse_method=method)
    return SamplingParams(temperature=0.0, max_new_tokens=args.output, ignore_eos=True, custom_params=wish)


def _table(args: argparse.Namespace, least: int | None, rows: list[dict[str, Any]]) -> Table:
    table = Table("context", "dense, tokens/s", "rule", "always", "time, rule", "always", "the rule chose")
    table.title = f"{args.method}, budget {args.budget}: from {least} tokens by the rule; times relative to dense"
    for row in rows:
        speeds = (f"{row[f'{kind}_tokens_per_s']:,.1f}" for kind in KINDS)
        ratios = (f"{row[f'{kind}_over_dense']:.2f}" for kind in KINDS[1:])
        table.add_row(f"{row['context']:,}", *speeds, *ratios, row["rule_chose"])
    return table


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.min_context", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="checkpoint folder (default: the bundled model)")
    parser.add_argument("--method", choices=[name for name in METHODS if name != "dense"], default="losa")
    parser.add_argument("--budget", type=int, default=256, help="prefix tokens per query")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384, 32640], help="of the prompts"
    )
    parser.add_argument("--output", type=int, default=48, help="tokens of each answer, in whole blocks")
    parser.add_argument("--steps", type=int, default=16, help="denoising steps per block")
    parser.add_argument("--rounds", type=int, default=3, help="of each context, at least")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each context, at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="the processor's seconds: with one thread, whatever else runs"
    )
    parser.add_argument("--results", type=Path, help="also add the row, with machine and commit, to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())

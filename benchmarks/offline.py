"""Offline throughput with and without batching and prefix sharing, side by side in one run on the bundled model.

    python -m benchmarks.offline --requests 32 --shared-prefix 4096 --unique 512

Every request has a prefix that all share, a part of its own, and writes the same number of tokens (EOS ignored). The
outputs of all variants are compared before any figure is printed: greedy tokens must be equal. (A sparse method may
select other pages where two are within rounding of one another, so for it that is demanded with --deterministic only;
`identical` says how many are.) `decode` figures leave out the rounds that carried prefill rows. The last line is JSON;
`tokens_per_s` is output tokens over all time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.batch import ForwardMode
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.core.work import Round

CHECKPOINT = Path(__file__).parent / "tiny_model" / "checkpoint"
# name -> (requests at once or None for all, prefix sharing)
VARIANTS: dict[str, tuple[int | None, bool]] = {
    "one_at_a_time": (1, False),
    "one_at_a_time_cached": (1, True),
    "batched": (None, False),
    "batched_cached": (None, True),
}


class Outcome(NamedTuple):
    """One variant. decode_s, decode_tokens: rounds without prefill rows and what they produced."""

    tokens: list[tuple[int, ...]]
    seconds: float
    decode_s: float
    decode_tokens: int
    forwards: int
    blocks: int
    hit_rate: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run all variants; 1 if their outputs differ."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    prompts = _prompts(args)
    outcomes: dict[str, Outcome] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for name in args.variants:
            bar = progress.add_task(name, total=len(prompts))
            outcomes[name] = _run(args, prompts, name, lambda done, bar=bar: progress.advance(bar, done))
    first = next(iter(outcomes.values()))
    pairs = [(a, b) for o in outcomes.values() for a, b in zip(first.tokens, o.tokens, strict=True)]
    identical = sum(a == b for a, b in pairs) / len(pairs)
    if identical < 1.0 and (args.method == "dense" or args.deterministic):
        console.print(f"[red]only {identical:.1%} of the outputs equal those of {next(iter(outcomes))}[/]")
        return 1
    _report(console, args, outcomes, identical)
    return 0


def _prompts(args: argparse.Namespace) -> list[list[int]]:
    rng = np.random.default_rng(args.seed)
    shared = rng.integers(10, 1500, args.shared_prefix)
    return [np.concatenate([shared, rng.integers(10, 1500, args.unique)]).tolist() for _ in range(args.requests)]


def _run(args: argparse.Namespace, prompts: list[list[int]], name: str, advance: Any) -> Outcome:
    running, cached = VARIANTS[name]
    context = args.shared_prefix + args.unique + args.output
    llm = LLM(
        model=str(args.model),
        max_running_requests=running or args.requests,
        max_total_tokens=args.requests * (context + 64),
        disable_radix_cache=not cached,
        sparse_method=args.method,
        disable_fused_commit=args.disable_fused_commit,
        deterministic=args.deterministic,
    )
    engine = llm.engine
    params = SamplingParams(
        temperature=0.0,
        max_new_tokens=args.output,
        ignore_eos=True,
        custom_params=DiffusionParams(algorithm="low_confidence_dynamic"),
    )
    rounds: list[tuple[bool, float, int]] = []
    schedule, prefills = engine.scheduler.schedule, [False]

    def watched() -> Round:
        work = schedule()
        prefills[0] = any(item.mode is ForwardMode.PREFILL for item in work.items)
        return work

    engine.scheduler.schedule = watched  # type: ignore[method-assign]
    step = engine.step

    def timed() -> Any:
        start = time.perf_counter()
        outputs = step()
        rounds.append((prefills[0], time.perf_counter() - start, sum(len(o.token_ids) for o in outputs)))
        advance(sum(o.finish is not None for o in outputs))
        return outputs

    engine.step = timed  # type: ignore[method-assign]
    start = time.perf_counter()
    results = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    stats = engine.stats()
    return Outcome(
        tokens=[r.token_ids for r in results],
        seconds=seconds,
        decode_s=sum(s for prefill, s, _ in rounds if not prefill),
        decode_tokens=sum(n for prefill, _, n in rounds if not prefill),
        forwards=int(str(stats["forwards"])),
        blocks=sum(r.stats.blocks for r in results),
        hit_rate=float(str(stats["cache_hit_rate"])),
    )


def _report(console: Console, args: argparse.Namespace, outcomes: dict[str, Outcome], identical: float) -> None:
    total = args.requests * args.output
    table = Table("variant", "seconds", "tokens/s", "tokens/s in decode", "forwards", "forwards per block", "hit rate")
    for name, o in outcomes.items():
        decode = f"{o.decode_tokens / o.decode_s:.1f}" if o.decode_s else "-"
        per_block = f"{o.forwards / o.blocks:.2f}"
        cells = (f"{o.seconds:.1f}", f"{total / o.seconds:.1f}", decode, str(o.forwards), per_block)
        table.add_row(name, *cells, f"{o.hit_rate:.1%}")
    console.print(table)
    speed = {name: total / o.seconds for name, o in outcomes.items()}
    result: dict[str, object] = {
        "requests": args.requests,
        "shared_prefix": args.shared_prefix,
        "unique": args.unique,
        "output": args.output,
        "method": args.method,
        "fused_commit": not args.disable_fused_commit,
        "deterministic": args.deterministic,
        "identical": round(identical, 4),
        "tokens_per_s": {name: round(value, 2) for name, value in speed.items()},
        "decode_tokens_per_s": {
            name: round(o.decode_tokens / o.decode_s, 2) for name, o in outcomes.items() if o.decode_s
        },
        "forwards_per_block": {name: round(o.forwards / o.blocks, 3) for name, o in outcomes.items()},
    }
    base = speed.get("one_at_a_time")
    for key, name in (("speedup_batched", "batched"), ("speedup_batched_cached", "batched_cached")):
        if base and name in speed:
            result[key] = round(speed[name] / base, 2)
    if "batched_cached" in outcomes:
        result["hit_rate"] = round(outcomes["batched_cached"].hit_rate, 4)
    print(json.dumps(result))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description=__doc__)
    parser.add_argument("--model", default=CHECKPOINT)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--shared-prefix", type=int, default=4096)
    parser.add_argument("--unique", type=int, default=512)
    parser.add_argument("--output", type=int, default=128, help="tokens written by each request")
    parser.add_argument("--method", default="dense", help="sparse method")
    parser.add_argument("--disable-fused-commit", action="store_true", help="a forward of its own for each commit")
    parser.add_argument("--deterministic", action="store_true", help="bitwise equal logits whatever the batch")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

"""Whole decode steps of a model with random weights, method against method: everything between tokens and tokens.

    python -m benchmarks.decode_step --device cuda --preset 8b --context 32768 --batch 8
    python -m benchmarks.decode_step --context 1024 --batch 2

First what the device can read per second, and the least time of a step that follows from the weights and the K/V that
it reads. Then blocks of all requests side by side: a first step, in which the block before is stored, and later steps.
The time of a step is that of the runner's whole round: tensors from work items, the model's layers, attention, logits,
sampling and counting. Every method plays the same prefixes; what random weights write is noise, so their queries agree
less, and their unions are wider, than those of trained models. The last line is JSON; times are medians.
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from benchmarks.decode_world import Setting, Step, World
from benchmarks.device import GIB, add_device, chosen_device
from benchmarks.result_file import add_row, circumstances
from losa_runtime.models.presets import PRESETS
from losa_runtime.sparse.method import METHODS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ASKED = ("preset", "layers", "context", "batch", "block", "blocks", "budget", "active", "device")
READ_TRIES = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement; the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    device = chosen_device(parser, args.device)
    if args.cpu_time and (args.threads != 1 or device.type != "cpu"):
        parser.error("--cpu-time: allowed with --threads 1 on a CPU, where the processor's seconds are those of a step")
    torch.set_num_threads(args.threads)
    console = Console(stderr=True, width=max(110, Console(stderr=True).width))
    setting = _setting(args, device)
    played: dict[str, list[list[Step]]] = {}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True
    ) as progress:
        bar = progress.add_task("weights and prefixes", total=1 + len(setting.methods))
        read = _read_rate(device, 2 * GIB if device.type == "cuda" else GIB // 4)
        world = World(setting)
        for method in setting.methods:
            progress.update(bar, description=method, advance=1)
            played[method] = world.play(method)[1:]
        progress.advance(bar)
    empty_s = world.without_attention()
    found = {method: _figures(world, blocks, read) for method, blocks in played.items()}
    console.print(f"read {read / 1e9:,.0f} GB/s; weights that a step reads {world.weight_bytes / 1e9:.2f} GB")
    console.print(_table(found))
    ceiling = _ceiling(world, empty_s, found)
    console.print(
        f"without attention a step takes {1e3 * empty_s:.1f} ms: a block whose later steps read nothing would be "
        f"{ceiling['block_speedup_at_most']:.2f} times as fast as a dense one"
        if "block_speedup_at_most" in ceiling
        else f"without attention a step takes {1e3 * empty_s:.1f} ms"
    )
    row = {"read_GB_s": round(read / 1e9, 1), "methods": found} | {name: getattr(args, name) for name in ASKED}
    row |= {"steps": setting.steps, "dtype": str(setting.dtype).removeprefix("torch."), "graphs": setting.graphs}
    row |= {"threads": args.threads, "clock": "processor" if args.cpu_time else "wall", "ceiling": ceiling}
    row |= {"speedup_vs_dense": _over_dense(found), "load_average": round(os.getloadavg()[0], 2)}
    row["prefix"] = "noise, written to the pages without a prefill"
    row["backend"] = type(world.runner.backend).__name__
    if args.output is not None:
        add_row(args.output, row | circumstances(device))
    print(json.dumps(row))
    return 0


def _figures(world: World, blocks: list[list[Step]], read: float) -> dict[str, Any]:
    """What was measured of one method."""
    setting = world.setting
    steps = [step for block in blocks for step in block]
    later = [step for step in steps if not step.first]
    block_s = median(sum(step.seconds for step in block) for block in blocks)
    step_s = median(step.seconds for step in later)
    costs = [cost for step in later for cost in step.costs]
    kv_bytes = sum(cost.kv_bytes + cost.metadata_bytes for cost in costs) / len(later)
    least = (world.weight_bytes + kv_bytes) / read
    return {
        "tokens_per_s": round(setting.batch * setting.block / block_s, 4),
        "step_ms": round(1e3 * step_s, 3),
        "first_step_ms": round(1e3 * median(step.seconds for step in steps if step.first), 3),
        "block_ms": round(1e3 * block_s, 3),
        "step_ms_least": round(1e3 * least, 3),
        "kv_density": round(sum(cost.density_kv for cost in costs) / len(costs), 4),
        "step_kv_MB": round(kv_bytes / 1e6, 2),
        "steps": len(later),
    }


def _ceiling(world: World, empty_s: float, found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What sparse reading can gain at most. A block's first step, with the commit before it, is dense in any case; the
    later ones cannot take less than the layers alone."""
    linear, attention = world.flops()
    known = {
        "step_ms_without_attention": round(1e3 * empty_s, 3),
        "linear_GFLOP": round(linear / 1e9, 2),
        "dense_attention_GFLOP": round(attention / 1e9, 2),
    }
    if "dense" in found:
        dense = found["dense"]
        least = dense["first_step_ms"] + (world.setting.steps - 1) * 1e3 * empty_s
        known["block_speedup_at_most"] = round(dense["block_ms"] / least, 2)
    return known


def _over_dense(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Tokens per second of whole blocks relative to dense attention, where that was measured."""
    if "dense" not in found:
        return {}
    base = found["dense"]["tokens_per_s"]
    return {name: round(each["tokens_per_s"] / base, 2) for name, each in found.items()}


def _table(found: dict[str, dict[str, Any]]) -> Table:
    columns = ("method", "tokens/s", "x first", "later step, ms", "least", "first step", "block", "prefix read")
    table = Table(*columns, title="median times; least: weights and prefix K/V at the rate of reading")
    base = next(iter(found.values()))["tokens_per_s"]
    for method, each in found.items():
        table.add_row(
            method,
            f"{each['tokens_per_s']:,.1f}",
            f"{each['tokens_per_s'] / base:.2f}",
            *(f"{each[name]:.2f}" for name in ("step_ms", "step_ms_least", "first_step_ms", "block_ms")),
            f"{each['kv_density']:.1%}",
        )
    return table


def _read_rate(device: torch.device, size: int) -> float:
    """Bytes read per second from a buffer much larger than the caches, the best of several tries."""
    buffer = torch.ones(size // 4, device=device)
    best = float("inf")
    for _ in range(READ_TRIES):
        start = time.perf_counter()
        buffer.sum().item()
        best = min(best, time.perf_counter() - start)
    return size / best


def _setting(args: argparse.Namespace, device: torch.device) -> Setting:
    same = ("preset", "context", "batch", "block", "blocks", "budget", "active", "backend", "seed")
    numbers = {name: getattr(args, name) for name in same}
    steps = args.steps or args.block
    small = {} if args.layers is None else {"num_hidden_layers": args.layers}
    return Setting(
        **numbers,
        overrides=small,
        steps=steps,
        page=args.page_size,
        dtype=DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")],
        device=device,
        methods=tuple(args.methods),
        cpu_time=args.cpu_time,
        graphs=device.type == "cuda" and not args.disable_cuda_graph,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_step", description=__doc__)
    add_device(parser)
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="shape of the model")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--context", type=int, default=1024, help="prefix tokens of each request")
    parser.add_argument("--batch", type=int, default=4, help="requests")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--steps", type=int, help="denoising steps per block (default: its length)")
    parser.add_argument("--blocks", type=int, default=4, help="blocks per request, the first to warm up")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["dense", "quest", "losa"])
    parser.add_argument("--budget", type=int, default=256, help="prefix tokens per query")
    parser.add_argument("--active", type=int, default=5, help="LoSA's active rows")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and pages (default: fp32 on a CPU, else bf16)")
    parser.add_argument("--backend", default="auto", help="attention backend")
    parser.add_argument("--disable-cuda-graph", action="store_true", help="run every step eagerly")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="the processor's seconds: with one thread, whatever else runs"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also add the row, with machine, versions and commit, to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Attention of one layer over a long prefix, with the real methods and kernels, against torch and the machine.

    python -m benchmarks.attention --context 65536 --block 16 --heads 32 --kv-heads 8 --head-dim 128
    python -m benchmarks.attention --device cuda --context 65536 --batch 8

First what the machine can do (bytes read and multiply-adds per second) and the least time of each variant that follows
from its bytes and FLOPs; then all variants in turn, several rounds, so that a busy neighbour troubles all alike. A step
is one later denoising step of a block, a block is 16 steps and the commit; the time is that of the call a model makes:
selection, attention to the prefix, attention inside the block, merging and remembering. `sdpa` is torch's attention
over contiguous K/V with the heads of a KV group folded into rows. Queries are made up (see attention_data): set `wide`
has the union of the active rows that --union asks for, or the widest there is; set `figure3` has the overlap of the
paper's figure 3. On a GPU the yardstick is FlashInfer's dense attention where the package is there, else Triton's, and
times are the device's own, with everything asked for before it begins; what the host needs to ask is ms_host.
The last line is JSON; its ratios are of medians, ratios_best of the best times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from benchmarks import attention_data as data
from benchmarks.attention_ceiling import measure
from benchmarks.attention_report import Samples, figures, say_ceiling, say_times
from benchmarks.attention_variants import Runner, Variant, Work, variants
from benchmarks.attention_world import Setting, World
from benchmarks.device import add_device, chosen_device
from benchmarks.result_file import add_row, circumstances

ASKED = ("context", "batch", "block", "dtype", "budget", "active", "union", "head_overlap", "threads", "device")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement; the exit code."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    console = Console(stderr=True, width=max(120, Console(stderr=True).width))
    base = _base(args)
    setting = _setting(args, base)
    names = [_set(kind, heads, args.head_overlap) for heads in args.head_overlap for kind in args.sets]
    chosen = [v for v in variants(names, args.batch, base) if not args.variants or v.name in args.variants]
    if not chosen:
        raise SystemExit(f"--variants: found {' '.join(args.variants)}, of which there is none here")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        world, queries, about = _prepare(args, setting, chosen, progress)
        bar = progress.add_task("ceiling", total=2 + 2 * 3)
        rows = {each * args.heads // args.kv_heads for each in (1, args.active, args.block)}
        buffer = (2**28 if args.quick else 2**29) * (1 if setting.device.type == "cpu" else 8)
        number = torch.float32 if setting.device.type == "cpu" else setting.dtype
        sizes = (rows, args.head_dim, args.kv_heads, buffer)
        ceiling = measure(*sizes, lambda: progress.advance(bar), setting.device, number)
        say_ceiling(console, ceiling, about)
        samples = _measure(world, chosen, queries, args, progress)
    say_times(console, chosen, samples, ceiling, base)
    found = figures(chosen, samples, ceiling, base)
    gain = found["block_ceiling"]
    console.print(f"with such later steps a block and its commit can be {gain} times as fast as {base} at most")
    asked = {name: getattr(args, name) for name in ASKED}
    row = found | asked | {"queries": about, "base": base, "backend": setting.backends[0]}
    if args.output is not None:
        add_row(args.output, row | circumstances(setting.device))
    print(json.dumps(row))
    return 0


def _set(kind: str, heads: float, every: Sequence[float]) -> str:
    return kind if heads == every[0] else f"{kind}_heads{heads:g}"


def _base(args: argparse.Namespace) -> str:
    """What all is compared with."""
    if args.device == "cpu":
        return "sdpa"
    return "flashinfer" if find_spec("flashinfer") is not None else "dense"


def _setting(args: argparse.Namespace, base: str) -> Setting:
    backends = (args.backend, *(["flashinfer"] if base == "flashinfer" else []))
    place = {"dtype": DTYPES[args.dtype], "device": torch.device(args.device), "backends": backends}
    same = ("context", "batch", "block", "heads", "kv_heads", "budget", "active", "seed")
    numbers = {name: getattr(args, name) for name in same}
    return Setting(dim=args.head_dim, page=args.page_size, **numbers, **place)


def _prepare(
    args: argparse.Namespace, setting: Setting, chosen: Sequence[Variant], progress: Progress
) -> tuple[World, dict[str, Tensor], dict[str, Any]]:
    """The world, the query sets [T, S, B, H, D], and what is to be said of them."""
    bar = progress.add_task("keys and queries", total=1 + len(args.sets) * len(args.head_overlap))
    methods = [variant.method for variant in chosen if variant.method is not None]
    world = World(setting, len(chosen) * setting.batch, sorted({"dense", *methods}))
    progress.advance(bar)
    queries: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for heads in args.head_overlap:
        for kind in args.sets:
            if kind == "wide":
                locality = data.union_of(setting.active, args.union, setting.sizes, heads, world.choice)
            else:
                locality = data.like_figure_3(setting.sizes, heads, world.choice)
            name = _set(kind, heads, args.head_overlap)
            queries[name], about[name] = _queries(setting, locality), _about(world, locality)
            progress.advance(bar)
    return world, queries, about


def _queries(setting: Setting, locality: data.Locality) -> Tensor:
    seeds = range(setting.seed + 1000, setting.seed + 1000 + setting.batch)
    made = [data.queries(setting.steps, setting.active, setting.sizes, locality, seed) for seed in seeds]
    return torch.stack(made, dim=1).to(setting.device)


def _about(world: World, locality: data.Locality) -> dict[str, Any]:
    """Union of the active rows and of all rows, as shares of the pages."""
    setting, choice = world.setting, world.choice
    growth_GR = choice.growth_GR(data.opening(setting.sizes, locality, setting.seed + 77)) / choice.bounds_PG2D.shape[0]
    mean_R = growth_GR.mean(0)
    return {
        "union_active": round(mean_R[setting.active - 1].item(), 4),
        "union_active_per_kv_head": [round(each, 4) for each in growth_GR[:, setting.active - 1].tolist()],
        "union_all": round(mean_R[-1].item(), 4),
        "growth": [round(each, 2) for each in (mean_R / mean_R[-1]).tolist()],
    }


def _measure(
    world: World, chosen: list[Variant], queries: dict[str, Tensor], args: argparse.Namespace, progress: Progress
) -> Samples:
    """Every variant once to warm up, then in turn. A step is much shorter than a block and gets more samples."""
    rounds = args.rounds or (2 if args.quick else 7)
    bar = progress.add_task("variants", total=(rounds + 1) * len(chosen))
    runners = []
    for index, variant in enumerate(chosen):
        runners.append(Runner(world, variant, queries[variant.queries], index * world.setting.batch))
        runners[-1].sample()
        progress.advance(bar)
    samples: Samples = {variant.name: [] for variant in chosen}
    for _ in range(rounds):
        for variant, runner in zip(chosen, runners, strict=True):
            again = 1 if variant.work is not Work.STEP else args.repeats
            samples[variant.name] += [runner.sample() for _ in range(again)]
            progress.advance(bar)
    return samples


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--context", type=int, default=65536, help="prefix tokens of each request")
    parser.add_argument("--batch", type=int, default=1, help="requests; with more than one, also a single one is timed")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--budget", type=int, default=1024, help="prefix tokens per query")
    parser.add_argument("--active", type=int, default=5, help="rows that change in a step")
    parser.add_argument("--dtype", choices=DTYPES, help="of stored K/V (default: fp32 on a CPU, else bf16)")
    add_device(parser)
    parser.add_argument("--backend", help="default: native on a CPU, else triton")
    parser.add_argument("--union", type=float, default=0.08, help="pages that the active rows select in set `wide`")
    overlap = "correlation of grouped query heads, 1 = identical; more than one value adds query sets"
    parser.add_argument("--head-overlap", type=float, nargs="+", default=[0.5], help=overlap)
    parser.add_argument("--sets", nargs="+", choices=["wide", "figure3"], default=["wide", "figure3"])
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=0, help="default 7, with --quick 2")
    parser.add_argument("--repeats", type=int, default=7, help="samples of a step per round")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also add the row, with machine, versions and commit, to this file")
    args = parser.parse_args(argv)
    device = chosen_device(parser, args.device)
    args.dtype = args.dtype or ("fp32" if device.type == "cpu" else "bf16")
    args.backend = args.backend or ("native" if device.type == "cpu" else "triton")
    return args


if __name__ == "__main__":
    sys.exit(main())

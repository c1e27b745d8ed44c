"""Everything that is measured on a GPU, in under ten minutes: attention over contexts and batches, then whole steps.

    python -m benchmarks.gpu            (make bench-gpu)

Rows go to benchmarks/results/attention_gpu.jsonl and decode_step_gpu.jsonl with device, versions and commit. What does
not fit into the device's memory, or into the time that is left, is skipped with a word.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from benchmarks import attention, decode_step
from benchmarks.device import GIB, chosen_device

RESULTS = Path(__file__).parent / "results"
CONTEXTS = (32768, 131072, 16384, 65536)  # the telling ones first
BATCHES = (8, 1, 32)
LEAST_S = 30.0  # what a run takes at least, so that none is begun in vain
# TraDo-8B: K and V of two layers with bounds; all 36 layers of it, and its weights.
LAYER_BYTES = 2 * 8 * 128 * 2 * (1 + 1 / 16)
MODEL_BYTES = 17 * GIB


class Run(NamedTuple):
    """One measurement: who makes it, with what, into which file, and the memory that it needs."""

    main: Callable[[Sequence[str]], int]
    arguments: tuple[str, ...]
    file: str
    need: float


def runs() -> Iterator[Run]:
    """In the order of their importance."""
    for block in (16, 32):
        for context in CONTEXTS:
            for batch in BATCHES if block == 16 else BATCHES[:1]:
                sizes = ("--context", str(context), "--batch", str(batch), "--block", str(block))
                arguments = ("--device", "cuda", *sizes, "--sets", "wide", "--rounds", "5", "--repeats", "5")
                yield Run(attention.main, arguments, "attention_gpu.jsonl", 2 * 2 * LAYER_BYTES * batch * context)
        yield from _steps() if block == 16 else ()


def _steps() -> Iterator[Run]:
    for context, batch, more in (
        (32768, 8, ()),
        (32768, 1, ()),
        (131072, 2, ()),
        (32768, 8, ("--disable-cuda-graph",)),
    ):
        sizes = (
            "--preset",
            "8b",
            "--context",
            str(context),
            "--batch",
            str(batch),
            "--budget",
            "1024",
            "--blocks",
            "3",
        )
        need = MODEL_BYTES + 36 * LAYER_BYTES * batch * context
        yield Run(decode_step.main, ("--device", "cuda", *sizes, *more), "decode_step_gpu.jsonl", need)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all; 0 if something was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=540.0, help="begin nothing that might end later")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the result files")
    args = parser.parse_args(argv)
    device = chosen_device(parser, "cuda")
    console, began, done = Console(stderr=True), time.monotonic(), 0
    for run in runs():
        what = f"{run.main.__module__} {' '.join(run.arguments)}"
        left = args.seconds - (time.monotonic() - began)
        free = torch.cuda.mem_get_info(device)[0]
        if left < LEAST_S:
            console.print(f"no time left for {what}")
        elif run.need > 0.9 * free:
            console.print(f"{run.need / GIB:.0f} GiB needed, {free / GIB:.0f} free: no {what}")
        else:
            console.rule(what)
            run.main([*run.arguments, "--output", str(args.folder / run.file)])
            done += 1
        gc.collect()
        torch.cuda.empty_cache()
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())

"""A checkpoint of random weights with the shape of a released model, loaded with and without 8-bit weights.

Each variant has a process of its own, so that nothing of another one is counted: `python -m
benchmarks.quantization_large FOLDER KIND DTYPE THREADS ROUNDS`, its last line JSON. Memory is what Linux counts as the
process's own (RssAnon), without the mapped file, looked at every few milliseconds while the weights are loaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.quantization_bundled import KINDS
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.layers.attention import AttendFn
from losa_runtime.layers.quantization import kept_bytes
from losa_runtime.models.model import load_model
from losa_runtime.models.random_checkpoint import write_random_checkpoint

ROWS = (16, 128)  # of a forward: one block, and eight
LOOK_S = 0.005


def measure(args: argparse.Namespace, tick: Callable[[], None]) -> dict[str, Any]:
    """One row for all variants and dtypes."""
    variants = []
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), args.preset)
        tick()
        for dtype in args.dtypes:
            for kind in KINDS:
                words = (folder, kind or "none", dtype, str(args.threads), str(args.rounds))
                command = (sys.executable, "-m", "benchmarks.quantization_large", *words)
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                variants.append(json.loads(done.stdout.splitlines()[-1]))
                tick()
    asked = {name: getattr(args, name) for name in ("preset", "rounds", "threads")}
    return {"benchmark": "large", "variants": variants, **asked}


class _Watch:
    """The most memory that was held while it ran."""

    def __init__(self) -> None:
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            self.most = max(self.most, own_memory())


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) << 10


def one(folder: Path, kind: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Load a variant and run it; seconds of processor time. held, peak: of the whole process, with its libraries."""
    config = ModelConfig.from_folder(folder)
    start = time.process_time()
    with _Watch() as watch:
        model = load_model(folder, config, dtype, "cpu", quantization=None if kind == "none" else cast(Any, kind))
    load_cpu_s, held = time.process_time() - start, own_memory()

    def nothing(layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        return q_THD

    def seconds(rows: int) -> float:
        tokens = torch.arange(rows) % config.vocab_size
        taken = []
        for turn in range(rounds + 1):
            begin = time.process_time()
            model(tokens, tokens, cast(AttendFn, nothing))
            taken += [time.process_time() - begin] if turn else []
        return round(statistics.median(taken), 4)

    with torch.inference_mode():
        forward_s = {str(rows): seconds(rows) for rows in ROWS}
    return {
        "kind": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "weight_bytes": kept_bytes(model),
        "held_bytes": held,
        "peak_bytes": max(watch.most, held),
        "load_cpu_s": round(load_cpu_s, 2),
        "forward_s": forward_s,
    }


if __name__ == "__main__":
    where, which, what, threads, turns = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(one(Path(where), which, getattr(torch, what), int(turns))))

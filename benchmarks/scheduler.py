"""Host time per round of the scheduler, without a model: what the runtime itself costs beside the forward.

    python -m benchmarks.scheduler --requests 64 --context 32768

Requests over long prompts (a share of each prompt is common to all) are prefilled, denoised and committed with a stub
in place of the forward; each part of the host's work is timed. The shares are of a round whose forward takes
--forward-ms, and again of the bundled model's real forward of as many denoising blocks, each over a short prefix.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from losa_runtime import LLM
from losa_runtime.cache.prefix_cache import Lease, PrefixCache
from losa_runtime.cache.radix import TokenIds
from losa_runtime.core.batch import ActiveRule, ForwardMode, SparseParams
from losa_runtime.core.decoding_params import DecodingParams
from losa_runtime.core.request import Request
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.core.work import BlockResult, Round, SegmentCost, WorkItem, nothing
from losa_runtime.runner.model_runner import Launched, ModelRunner
from losa_runtime.scheduler.req import Req, ReqSettings
from losa_runtime.scheduler.scheduler import Scheduler, SchedulerLimits
from losa_runtime.sparse.method import method_class
from losa_runtime.text_stream import TextStream
from losa_runtime.tokenizer import Detokenizer

CHECKPOINT = Path(__file__).parent / "tiny_model" / "checkpoint"
PARTS = ("radix", "schedule", "batch", "commit")
COST = SegmentCost(0.1, 0.1, (0.3,) * 16, dense=False, kv_bytes=1, metadata_bytes=1, dense_bytes=10)


class Clock:
    """Adds up seconds by part, for the current round."""

    def __init__(self) -> None:
        self.now = dict.fromkeys(PARTS, 0.0)
        self.rounds: list[tuple[bool, dict[str, float]]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part."""
        start = time.perf_counter()
        yield
        self.now[name] += time.perf_counter() - start

    def end_round(self, decoding: bool) -> None:
        """Close a round; the radix time inside schedule and commit is counted once."""
        self.rounds.append((decoding, self.now))
        self.now = dict.fromkeys(PARTS, 0.0)


class TimedCache(PrefixCache):
    """A prefix cache whose match and insert are timed."""

    clock: Clock

    def open(self, namespace: str, tokens: TokenIds, capacity: int) -> Lease:
        with self.clock.part("radix"):
            return super().open(namespace, tokens, capacity)

    def peek(self, namespace: str, tokens: TokenIds) -> int:
        with self.clock.part("radix"):
            return super().peek(namespace, tokens)

    def publish(self, lease: Lease, tokens: TokenIds) -> None:
        with self.clock.part("radix"):
            super().publish(lease, tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement; the exit code."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    llm = LLM(model=str(CHECKPOINT), max_total_tokens=256 * args.requests, max_running_requests=args.requests)
    clock = Clock()
    scheduler = _scheduler(args, llm, clock)
    for index, prompt in enumerate(_prompts(args)):
        scheduler.add(_request(index, prompt, args, llm))
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("rounds", total=None)
        while scheduler.has_work:
            _round(scheduler, llm.engine.parts.runner, clock)
            progress.advance(bar)
    forward_s = _real_forward(args, llm) if args.real else None
    _report(console, args, clock, forward_s)
    return 0


def _scheduler(args: argparse.Namespace, llm: LLM, clock: Clock) -> Scheduler:
    config, page = llm.engine.parts.model_config, llm.engine.config.page_size
    room = args.requests * (args.context + args.output + config.block_length)
    cache = TimedCache(room // page + args.requests, page, config.block_length)
    cache.clock = clock
    limits = SchedulerLimits(config.block_length, config.mask_token_id, args.requests, args.requests, 8192, True)
    return Scheduler(cache, limits)


def _prompts(args: argparse.Namespace) -> list[np.ndarray]:
    rng = np.random.default_rng(args.seed)
    common = rng.integers(10, 1000, int(args.context * args.shared))
    own = args.context - common.size
    return [np.concatenate([common, rng.integers(10, 1000, own)]) for _ in range(args.requests)]


def _request(index: int, prompt: np.ndarray, args: argparse.Namespace, llm: LLM) -> Req:
    block = llm.engine.parts.model_config.block_length
    request = Request(
        rid=str(index), prompt_ids=tuple(prompt.tolist()), sampling=SamplingParams(max_new_tokens=args.output)
    )
    settings = ReqSettings(
        seed=index,
        limit=args.context + args.output,
        stop_ids=frozenset(),
        ban_always=(),
        ban_early=(),
        sparse=SparseParams("losa", 1024, ActiveRule("count", 5), method_class("losa").Options(), 16),
        decoding=DecodingParams("low_confidence_static", 0.9, block),
        text=TextStream(Detokenizer(llm.tokenizer)),
    )
    return Req(request, settings, index, block)


def _round(scheduler: Scheduler, runner: ModelRunner, clock: Clock) -> None:
    before = clock.now["radix"]
    start = time.perf_counter()
    work = scheduler.schedule()
    clock.now["schedule"] += time.perf_counter() - start - (clock.now["radix"] - before)
    with clock.part("batch"):
        runner.tensors(work.items)
    results = _stub(work)
    before = clock.now["radix"]
    start = time.perf_counter()
    scheduler.commit(results)
    clock.now["commit"] += time.perf_counter() - start - (clock.now["radix"] - before)
    clock.end_round(decoding=all(item.mode is not ForwardMode.PREFILL for item in work.items))


def _stub(work: Round) -> list[BlockResult]:
    """Two tokens per block and step, as if a model had said so."""
    return [nothing() if item.mode.stores else _accept(item) for item in work.items]


def _accept(item: WorkItem) -> BlockResult:
    assert item.candidates is not None
    chosen = item.candidates[:2]
    return BlockResult(chosen, chosen + 10, np.full(chosen.size, -0.1), COST)


def _real_forward(args: argparse.Namespace, llm: LLM) -> float:
    """Seconds of one denoising forward of the bundled model for as many requests, each over a short prefix."""
    prompt = list(range(10, 74))
    params = SamplingParams(temperature=0.0, max_new_tokens=16, ignore_eos=True)
    runner, seconds = llm.engine.parts.runner, []
    original: Callable[[Round], Launched] = runner.launch

    def timed(work: Round) -> Launched:
        start = time.perf_counter()
        results = original(work).wait()
        if all(item.mode is ForwardMode.DENOISE for item in work.items):
            seconds.append(time.perf_counter() - start)
        return Launched(work, lambda: results)

    runner.launch = timed  # type: ignore[method-assign]
    llm.generate([prompt] * args.requests, params)
    runner.launch = original  # type: ignore[method-assign]
    return median(seconds) if seconds else float("nan")


def _report(console: Console, args: argparse.Namespace, clock: Clock, forward_s: float | None) -> None:
    table = Table("rounds", "count", *(f"{part} ms" for part in PARTS), "host ms", title="host time per round (mean)")
    decoding = [parts for is_decoding, parts in clock.rounds if is_decoding]
    every = [parts for _, parts in clock.rounds]
    for name, rounds in (("with prefill", [p for d, p in clock.rounds if not d]), ("decoding", decoding)):
        cells = [f"{1e3 * mean(r[part] for r in rounds):.3f}" for part in PARTS] if rounds else ["-"] * len(PARTS)
        total = f"{1e3 * mean(sum(r.values()) for r in rounds):.3f}" if rounds else "-"
        table.add_row(name, str(len(rounds)), *cells, total)
    console.print(table)
    host_s = mean(sum(parts.values()) for parts in every)
    radix_s = mean(parts["radix"] for parts in every)
    result: dict[str, object] = {
        "requests": args.requests,
        "context": args.context,
        "rounds": len(every),
        "forward_ms": args.forward_ms,
        "host_ms": round(1e3 * host_s, 3),
        "host_share": round(host_s / (host_s + args.forward_ms / 1e3), 4),
        "radix_share": round(radix_s / (host_s + args.forward_ms / 1e3), 4),
        "us_per_request": round(1e6 * host_s / args.requests, 1),
    }
    if forward_s is not None:
        result["real_forward_ms"] = round(1e3 * forward_s, 1)
        result["host_share_real"] = round(host_s / (host_s + forward_s), 4)
        result["radix_share_real"] = round(radix_s / (host_s + forward_s), 4)
    print(json.dumps(result))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduler", description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--context", type=int, default=32768, help="prompt tokens of each request")
    parser.add_argument("--shared", type=float, default=0.5, help="share of the prompt that all have in common")
    parser.add_argument("--output", type=int, default=128, help="tokens generated by each request")
    parser.add_argument("--forward-ms", type=float, default=50.0, help="forward time that the shares refer to")
    parser.add_argument("--no-real", dest="real", action="store_false", help="skip the bundled model's forward")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

"""What a round of running requests costs outside the model: the host's share, in the processor's seconds of one thread.

    python -m benchmarks.host_share --method losa

Questions over one document run side by side, all of them in every round. Counted apart: the model's layers with their
attention, the projection to the vocabulary, and the rest: sampling, acceptance, scheduling, the radix tree, texts.
`--profile N` lists the N functions in which the rest of the time is spent. The last line is JSON.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.result_file import add_row, circumstances
from benchmarks.tiny_model.corpus import chat_prompt, demo
from losa_runtime import LLM, SamplingParams
from losa_runtime.core.request import Request

CHECKPOINT = Path(__file__).parent / "tiny_model" / "checkpoint"
WARM_ROUNDS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit code."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    budget = {} if args.method == "dense" else {"token_budget": args.budget}
    llm = LLM(
        model=str(args.model),
        sparse_method=args.method,
        max_running_requests=args.requests,
        max_total_tokens=args.context + args.requests * 512,
        algorithm="low_confidence_static",
        **budget,
    )
    engine, model = llm.engine, llm.engine.parts.runner.model
    _add(llm, args)
    while len(engine.scheduler.running) < args.requests or any(req.prefilling for req in engine.scheduler.running):
        engine.step()
    for _ in range(WARM_ROUNDS):
        engine.step()
    layers, head = _Counted(model.forward), _Counted(model.logits)
    model.forward, model.logits = layers, head  # type: ignore[method-assign]
    profile = cProfile.Profile(time.process_time)
    if args.profile:
        profile.enable()
    began, rounds = time.process_time(), 0
    while rounds < args.rounds and len(engine.scheduler.running) == args.requests:
        engine.step()
        rounds += 1
    seconds = time.process_time() - began
    profile.disable()
    if args.profile:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(args.profile)
    backend = type(engine.parts.runner.backend).__name__
    row = _row(args, backend, rounds, seconds, layers.seconds, head.seconds)
    if args.results is not None:
        add_row(args.results, row | circumstances(torch.device("cpu")))
    print(json.dumps(row))
    return 0


class _Counted:
    """A call whose processor seconds are added up."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.seconds = call, 0.0

    def __call__(self, *arguments: Any) -> Any:
        began = time.process_time()
        found = self.call(*arguments)
        self.seconds += time.process_time() - began
        return found


def _add(llm: LLM, args: argparse.Namespace) -> None:
    """All requests, of the same length of output, which no stop token ends."""
    room = args.context - 128  # for the question
    document = demo(max(room, 64))
    params = SamplingParams(temperature=0.0, max_new_tokens=256, ignore_eos=True)
    for number in range(args.requests):
        question = document.questions[number % len(document.questions)].text
        ids = llm.tokenizer.encode(chat_prompt(document.text, question))[-args.context :]
        llm.engine.add(Request(rid=f"{number}", prompt_ids=tuple(ids), sampling=params))


def _row(
    args: argparse.Namespace, backend: str, rounds: int, seconds: float, layers: float, head: float
) -> dict[str, Any]:
    rest = seconds - layers - head
    return {
        "benchmark": "host_share",
        **{name: getattr(args, name) for name in ("method", "requests", "context", "budget")},
        "backend": backend,
        "rounds": rounds,
        "round_ms": round(1e3 * seconds / rounds, 3),
        "layers_ms": round(1e3 * layers / rounds, 3),
        "vocabulary_ms": round(1e3 * head / rounds, 3),
        "rest_ms": round(1e3 * rest / rounds, 3),
        "host_share": round(rest / seconds, 4),
        "profiled": bool(args.profile),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_share", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="checkpoint folder (default: the bundled model)")
    parser.add_argument("--method", default="dense", help="sparse method")
    parser.add_argument("--budget", type=int, default=256, help="its prefix tokens per query")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--context", type=int, default=4096, help="longest prompt, in tokens")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="also list N functions (slows the rest)")
    parser.add_argument("--results", type=Path, help="also add the row, with machine and commit, to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())

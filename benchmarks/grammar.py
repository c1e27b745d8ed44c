"""What constrained output costs per denoising step, and what it does to the answers, on the bundled model.

    python -m benchmarks.grammar [--parts cost answers large] [--record]

Cost: 16 requests at once, a fixed number of denoising steps per block, without a constraint and with several, in turn;
time and CPU time of a round that carries denoising rows: the forward over 16 blocks, sampling, and what is done on the
host between two forwards. Answers: see `grammar_answers`. Large: see `grammar_large`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.grammar_answers import MODES, answers
from benchmarks.grammar_large import PATTERNS, large
from benchmarks.quality.samples import documents
from benchmarks.result_file import circumstances, keep_row
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.request import Request, RequestOutput
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.engine import Engine

CHECKPOINT = Path(__file__).parent / "tiny_model" / "checkpoint"
RESULTS = Path(__file__).parent / "results" / "grammar.jsonl"
PARTS = ("cost", "answers", "large")
LONG = {
    "text": r"(?:[a-z0-9]{1,12}[ ,.]{1,2}){24,}",
    "json": {
        "type": "object",
        "properties": {
            "title": {"type": "string", "minLength": 40, "maxLength": 60},
            "codes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9999}, "minItems": 8},
            "done": {"type": "boolean"},
        },
        "required": ["title", "codes", "done"],
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grammar", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="denoising steps per block, for the cost")
    parser.add_argument("--rounds", type=int, default=3, help="runs per constraint, behind one that is not counted")
    parser.add_argument("--samples", type=int, default=240, help="answers per task, mode and pace")
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help=f"put the rows into {RESULTS.name}")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    config = EngineConfig(model=str(CHECKPOINT), max_running_requests=args.requests, show_progress=False)
    engine = Engine(config)
    asked = {name: getattr(args, name) for name in ("requests", "context", "output_tokens", "steps", "threads")}
    rows: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        for part in args.parts:
            bar = progress.add_task(part, total={"cost": 5 * (args.rounds + 1), "answers": 15, "large": 3}[part])

            def tick(bar: Any = bar) -> None:
                progress.advance(bar)

            if part == "cost":
                rows.append({"benchmark": part, **_cost(engine, args, tick), **asked})
            elif part == "answers":
                few = {"context": args.context, "samples": args.samples}
                rows.append({"benchmark": part, "rows": _summed(answers(engine, **few, tick=tick)), **few})
            else:
                rows.append({"benchmark": part, "vocabulary": args.vocabulary, **large(args.vocabulary, tick)})
    for row in rows:
        _say(console, row)
        if args.record:
            keep_row(RESULTS, row | circumstances(torch.device("cpu")))
    print(json.dumps(rows))
    return 0


def _cost(engine: Engine, args: argparse.Namespace, tick: Callable[[], None]) -> dict[str, Any]:
    """Median time and CPU time of a denoising round by constraint and mode, and relative to none."""
    asked = documents("multi_value", args.context, args.requests, 4, seed=0)
    prompts = [tuple(engine.parts.tokenizer.encode(prompt)) for document in asked for prompt in document.prompts]
    wishes: dict[str, dict[str, Any]] = {"none": {"ignore_eos": True}}
    for mode in MODES:
        wishes[f"regex, {mode}"] = {"regex": LONG["text"], "custom_params": {"grammar_mode": mode}}
        wishes[f"json, {mode}"] = {"json_schema": json.dumps(LONG["json"]), "custom_params": {"grammar_mode": mode}}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in wishes}
    for turn in range(args.rounds + 1):
        for name, wish in wishes.items():
            custom = {"denoising_steps": args.steps, "algorithm": "low_confidence_static"}
            fixed = {"temperature": 0, "max_new_tokens": args.output_tokens}
            found = _run(engine, prompts, wish | fixed | {"custom_params": wish.get("custom_params", {}) | custom})
            seconds[name] += found if turn else []
            tick()
    row: dict[str, Any] = {}
    for which, label in enumerate(("ms_per_step", "cpu_ms_per_step")):
        medians = {name: statistics.median(each[which] for each in found) for name, found in seconds.items()}
        row[label] = {name: round(found * 1e3, 2) for name, found in medians.items()}
        more = {name: round(found / medians["none"] - 1, 3) for name, found in medians.items() if name != "none"}
        row[f"{label}_more"] = more
    return row


def _run(engine: Engine, prompts: Sequence[tuple[int, ...]], params: dict[str, Any]) -> list[tuple[float, float]]:
    """Seconds and CPU seconds of the rounds in which all denoise."""
    sampling = SamplingParams.parse(params)
    for number, prompt in enumerate(prompts):
        engine.add(Request(rid=str(number), prompt_ids=prompt, sampling=sampling))
    seconds: list[tuple[float, float]] = []
    while engine.has_work():
        began = time.perf_counter(), time.process_time()
        outputs: list[RequestOutput] = engine.step()
        elapsed = time.perf_counter() - began[0], time.process_time() - began[1]
        running = engine.scheduler.running
        if len(running) == len(prompts) and not any(req.prefilling for req in running):
            seconds.append(elapsed)
        for output in outputs:
            if output.finish is not None and output.finish.type == "error":
                raise RuntimeError(output.finish.message)
    return seconds


def _summed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means, and by how much `map` is better than `valid` on the same questions, with the middle 95 % of 2,000
    resamplings."""
    by_case = {(row["task"], row["pace"], row["mode"]): row["quality"] for row in rows}
    found = []
    for row in rows:
        mine = {name: value for name, value in row.items() if name != "quality"}
        mine["mean"] = round(statistics.fmean(row["quality"]), 4)
        if row["mode"] == "map":
            other = by_case[row["task"], row["pace"], "valid"]
            better = [a - b for a, b in zip(row["quality"], other, strict=True)]
            rng = random.Random(0)
            means = sorted(statistics.fmean(rng.choices(better, k=len(better))) for _ in range(2000))
            mine["better_than_valid"] = [round(x, 4) for x in (statistics.fmean(better), means[50], means[1949])]
        found.append(mine)
    return found


def _say(console: Console, row: dict[str, Any]) -> None:
    if row["benchmark"] == "cost":
        table = Table(
            "constraint, mode",
            "ms per step",
            "more",
            "CPU ms per step",
            "more",
            title=f"{row['requests']} requests at once",
        )
        for name in row["ms_per_step"]:
            more = [row[f"{kind}_more"].get(name) for kind in ("ms_per_step", "cpu_ms_per_step")]
            shown = ["" if each is None else f"{each:+.1%}" for each in more]
            table.add_row(
                name, f"{row['ms_per_step'][name]:.2f}", shown[0], f"{row['cpu_ms_per_step'][name]:.2f}", shown[1]
            )
    elif row["benchmark"] == "answers":
        table = Table("task", "pace", "mode", "mean", "steps per block", "CPU ms per answer", "map better by")
        for each in row["rows"]:
            cells = [str(each[name] or "free") for name in ("task", "pace", "mode")]
            figures = [str(each[name]) for name in ("mean", "steps_per_block", "cpu_ms_per_answer")]
            better = each.get("better_than_valid")
            table.add_row(*cells, *figures, "" if better is None else "{} ({} to {})".format(*better))
    else:
        columns = ("compile_ms", "guide_ms", "map_ms", "valid_ms")
        table = Table("pattern", "states", *columns, "bytes", title="first and later, a block of 16 masks")
        for name in PATTERNS:
            figures = [f"{row[name][column]['first']} {row[name][column]['later']}" for column in columns]
            table.add_row(name, str(row[name]["states"]), *figures, str(row[name]["bytes"]))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())

"""What constrained output costs per denoising step, and what it does to the answers, on the bundled model.

    python -m benchmarks.grammar

Cost: 16 requests at once, a fixed number of denoising steps, with and without a constraint, in turn; the time of a
round that carries denoising rows. The same for the grammar's part alone over a made-up vocabulary of 150,000 tokens,
per request and step, the first time (rows of the automaton are made) and later. Answers: questions whose answer has a
known form, free, and under that form in both modes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.quality.samples import documents
from benchmarks.result_file import add_row, circumstances
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.request import Request, RequestOutput
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.engine import Engine
from losa_runtime.grammar.block_paths import Block, Reach, best_path
from losa_runtime.grammar.compile_worker import compile_pattern
from losa_runtime.grammar.token_automaton import TokenAutomaton
from losa_runtime.grammar.vocabulary import Vocabulary

CHECKPOINT = Path(__file__).parent / "tiny_model" / "checkpoint"
CODES = "[0-9]{4}(?:, [0-9]{4}){0,3}"
FORMS: dict[str, dict[str, Any]] = {
    "free": {},
    "codes, map": {"regex": CODES, "custom_params": {"grammar_mode": "map"}},
    "codes, valid": {"regex": CODES, "custom_params": {"grammar_mode": "valid"}},
}
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
PATTERNS_150K = {
    "digits": "[0-9]{4}",
    "json": r'\{"name": "[^"\\]{1,40}", "age": [0-9]{1,3}\}',
    "free text": r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*"',
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grammar", description=__doc__)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="denoising steps per block")
    parser.add_argument("--samples", type=int, default=96, help="questions per form")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also add the row to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    config = EngineConfig(model=str(CHECKPOINT), max_running_requests=args.requests, show_progress=False)
    engine = Engine(config)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("measuring", total=args.rounds * 5 + len(FORMS) + len(PATTERNS_150K))
        cost = _cost(engine, args, lambda: progress.advance(bar))
        answers = _answers(engine, args, lambda: progress.advance(bar))
        large = _large(args.vocabulary, lambda: progress.advance(bar))
    _say(console, cost, answers, large)
    asked = {
        name: getattr(args, name) for name in ("requests", "context", "output_tokens", "steps", "samples", "threads")
    }
    row = {"cost": cost, "answers": answers, "vocabulary": args.vocabulary, "large": large} | asked
    if args.output is not None:
        add_row(args.output, row | circumstances(torch.device("cpu")))
    print(json.dumps(row))
    return 0


def _cost(engine: Engine, args: argparse.Namespace, tick: Any) -> dict[str, Any]:
    """Median time of a denoising round by constraint and mode, and relative to none."""
    prompts = _prompts(engine, args.context, args.requests)
    wishes: dict[str, dict[str, Any]] = {"none": {"ignore_eos": True}}
    for mode in ("map", "valid"):
        wishes[f"regex, {mode}"] = {"regex": LONG["text"], "custom_params": {"grammar_mode": mode}}
        wishes[f"json, {mode}"] = {"json_schema": json.dumps(LONG["json"]), "custom_params": {"grammar_mode": mode}}
    seconds: dict[str, list[float]] = {name: [] for name in wishes}
    for _ in range(args.rounds):
        for name, wish in wishes.items():
            params = _fixed(wish, args.steps) | {"max_new_tokens": args.output_tokens}
            seconds[name] += _run(engine, prompts, params)[1]
            tick()
    ms = {name: statistics.median(found) * 1e3 for name, found in seconds.items()}
    more = {name: round(found / ms["none"] - 1, 3) for name, found in ms.items() if name != "none"}
    return {"ms_per_step": {name: round(found, 2) for name, found in ms.items()}, "more_than_none": more}


def _answers(engine: Engine, args: argparse.Namespace, tick: Any) -> dict[str, Any]:
    """Right answers and milliseconds per question, by form."""
    asked = documents("multi_value", args.context, args.samples, 4, seed=0)
    found: dict[str, Any] = {}
    for name, form in FORMS.items():
        params = _fixed(form, args.steps) | {"max_new_tokens": 32}
        right = formed = 0
        began = time.perf_counter()
        for document in asked:
            prompts = [tuple(engine.parts.tokenizer.encode(prompt)) for prompt in document.prompts]
            outputs, _ = _run(engine, prompts, params)
            wanted = [question.answer for question in document.questions]
            for text, answer in zip(outputs, wanted, strict=True):
                right += text.strip() == answer
                formed += text.count(", ") == answer.count(", ")
        count = sum(len(document.questions) for document in asked)
        found[name] = {
            "right": round(right / count, 4),
            "as_many_codes": round(formed / count, 4),
            "ms_per_question": round((time.perf_counter() - began) / count * 1e3, 1),
        }
        tick()
    return found


def _fixed(wish: dict[str, Any], steps: int) -> dict[str, Any]:
    """Greedy, in a fixed number of steps per block."""
    custom = {"denoising_steps": steps, "algorithm": "low_confidence_static"}
    return wish | {"custom_params": wish.get("custom_params", {}) | custom, "temperature": 0}


def _run(engine: Engine, prompts: Sequence[tuple[int, ...]], params: dict[str, Any]) -> tuple[list[str], list[float]]:
    """Texts of all prompts together, and the seconds of the rounds in which all of them denoise."""
    sampling = SamplingParams.parse(params)
    for number, prompt in enumerate(prompts):
        engine.add(Request(rid=str(number), prompt_ids=prompt, sampling=sampling))
    texts, seconds = [""] * len(prompts), list[float]()
    while engine.has_work():
        began = time.perf_counter()
        outputs: list[RequestOutput] = engine.step()
        elapsed = time.perf_counter() - began
        running = engine.scheduler.running
        if len(running) == len(prompts) and not any(req.prefilling for req in running):
            seconds.append(elapsed)
        for output in outputs:
            texts[int(output.rid)] += output.text
            if output.finish is not None and output.finish.type == "error":
                raise RuntimeError(output.finish.message)
    return texts, seconds


def _prompts(engine: Engine, context: int, count: int) -> list[tuple[int, ...]]:
    asked = documents("multi_value", context, count, 4, seed=0)
    return [tuple(engine.parts.tokenizer.encode(prompt)) for document in asked for prompt in document.prompts][:count]


def _large(size: int, tick: Any) -> dict[str, Any]:
    """Milliseconds per request and step for finding a path through 16 masks, over a large vocabulary."""
    rng, generator = random.Random(0), np.random.default_rng(0)
    vocabulary, end = made_up_vocabulary(size, rng)
    logp = {hole: np.log(generator.dirichlet(np.full(size, 0.01)) + 1e-30) for hole in range(16)}
    found: dict[str, Any] = {}
    for name, pattern in PATTERNS_150K.items():
        automaton = TokenAutomaton(compile_pattern(pattern), vocabulary, frozenset({end}))
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            reach = Reach(automaton, Block(np.full(16, -1), 0, 100))
            best_path(reach, logp)
            for hole in range(16):
                reach.allowed(hole)
            seconds.append(time.perf_counter() - began)
        found[name] = {
            "states": automaton.automaton.states,
            "first_ms": round(seconds[0] * 1e3, 1),
            "later_ms": round(statistics.median(seconds[1:]) * 1e3, 1),
        }
        tick()
    return found


def made_up_vocabulary(size: int, rng: random.Random) -> tuple[Vocabulary, int]:
    """`size` tokens: all bytes, words of letters and digits with and without a space before them, and an end."""
    pieces = {bytes((byte,)): None for byte in range(256)}
    letters = 'etaoinshrdlucmfwypvbgkjqxz0123456789"{}:,.'
    while len(pieces) < size - 1:
        word = "".join(rng.choice(letters) for _ in range(rng.randint(2, 8)))
        pieces[(rng.choice(("", " ")) + word).encode()] = None
    return Vocabulary([*pieces, b""]), size - 1


def _say(console: Console, cost: dict[str, Any], answers: dict[str, Any], large: dict[str, Any]) -> None:
    table = Table("constraint, mode", "ms per step", "more than none", title="16 requests at once")
    for name, found in cost["ms_per_step"].items():
        more = cost["more_than_none"].get(name)
        table.add_row(name, f"{found:.2f}", "" if more is None else f"{more:+.1%}")
    console.print(table)
    table = Table("form", "right", "as many codes", "ms per question", title="answers")
    for name, found in answers.items():
        table.add_row(name, f"{found['right']:.1%}", f"{found['as_many_codes']:.1%}", str(found["ms_per_question"]))
    console.print(table)
    table = Table("pattern", "states", "first, ms", "later, ms", title="a block of 16 over a large vocabulary")
    for name, found in large.items():
        table.add_row(name, *(str(found[key]) for key in ("states", "first_ms", "later_ms")))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())

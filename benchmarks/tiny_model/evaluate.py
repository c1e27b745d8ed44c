"""Measures the answers of a checkpoint through the runtime's offline face.

    python -m benchmarks.tiny_model.evaluate --context 2048 --json
    python -m benchmarks.tiny_model.evaluate --context 4096 --method losa --budget 256 --samples 50

Documents come from evaluation seeds, which training never draws. An answer counts only as a whole. The last line
printed is one JSON object, and with --json the only one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.tiny_model import corpus

CHECKPOINT = Path(__file__).parent / "checkpoint"
NEW_TOKENS = 32


def prompts(task: str, context: int, samples: int) -> tuple[list[str], list[corpus.Question]]:
    """Chat prompts of one task and their questions."""
    pairs = [corpus.evaluation_task(task, context, sample) for sample in range(samples)]
    return [corpus.chat_prompt(text, question.text) for text, question in pairs], [q for _, q in pairs]


def measure(llm: Any, params: Any, task: str, context: int, samples: int, batch: int, verbose: bool) -> float:
    """Share of fully right answers of one task."""
    asked, questions = prompts(task, context, samples)
    right = 0
    for at in range(0, samples, batch):
        outputs = llm.generate(asked[at : at + batch], params)
        for output, question in zip(outputs, questions[at : at + batch], strict=True):
            hit = output.text.strip() == question.answer
            right += hit
            if verbose and not hit:
                print(f"{task}: {question.text} expected {question.answer!r}, found {output.text!r}")
    return right / samples


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--context", type=int, default=2048, help="prompt tokens")
    parser.add_argument("--samples", type=int, default=20, help="documents per task")
    parser.add_argument("--tasks", nargs="+", default=list(corpus.TASKS), choices=corpus.TASKS)
    parser.add_argument("--method", default="dense", help="sparse attention method of the runtime")
    parser.add_argument("--budget", type=int, default=None, help="tokens each query may attend to, for sparse methods")
    parser.add_argument("--batch", type=int, default=8, help="prompts handed over at once")
    parser.add_argument("--threshold", type=float, default=0.9, help="confidence from which a token is kept")
    parser.add_argument("--json", action="store_true", help="print the result line only")
    args = parser.parse_args()

    from losa_runtime import LLM, SamplingParams

    options: dict[str, Any] = {"sparse_method": args.method, "threshold": args.threshold}
    if args.budget is not None:
        options["token_budget"] = args.budget
    llm = LLM(model=args.model, **options)
    params = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS)
    result: dict[str, Any] = {"context": args.context, "method": args.method}
    if args.budget is not None:
        result["budget"] = args.budget
    result |= {"samples": args.samples, "tasks": {}}
    for task in args.tasks:
        started = time.time()
        result["tasks"][task] = measure(llm, params, task, args.context, args.samples, args.batch, not args.json)
        if not args.json:
            print(f"{task}: {result['tasks'][task]:.3f} in {time.time() - started:.1f} s", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

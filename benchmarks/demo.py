"""`make demo`: the bundled model, served with LoSA, reads a long document and answers questions through SGLang.

Starts a real server on a free port, runs the SGLang program of `demo_program`, then asks the same questions again over
plain HTTP with LoSA and densely, and shows what each had to read. Exits with 1 if an answer could not be produced.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.tiny_model.corpus import TASKS, Document, Question, chat_prompt, demo
from losa_server.bench.running_server import RunningServer, ServerFailed

CHECKPOINT = Path(__file__).parent / "tiny_model" / "checkpoint"
CHOICES = 4


@dataclass
class Run:
    """All questions asked once with one method."""

    method: str
    replies: list[Any]
    seconds: float

    def total(self, name: str) -> int:
        """Sum of a counter of meta_info."""
        return sum(reply.meta.get(name) or 0 for reply in self.replies)

    def mean(self, name: str) -> float | None:
        """Mean of a share of meta_info over the replies that have it."""
        values = [reply.meta[name] for reply in self.replies if reply.meta.get(name) is not None]
        return sum(values) / len(values) if values else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; the exit code."""
    args = _arguments(argv)
    console = Console()
    try:
        import sglang as sgl
    except ImportError:
        console.print("[red]the demonstration needs SGLang's frontend:[/] pip install 'losa-runtime\\[frontend]'")
        return 1
    document = demo(args.tokens)
    questions = pick_questions(document, args.questions)
    options = ["--sparse-method", "losa", "--token-budget", str(args.token_budget), "--log-level", "warning"]
    # The bundled model is sure of short answers at once, and the threshold rule would accept them in a block's first
    # step, which reads the prefix densely. A fixed number of steps shows what the later ones read.
    options += ["--algorithm", "low_confidence_static", "--denoising-steps", str(args.steps)]
    produced = False
    try:
        with ExitStack() as stack:
            with console.status("starting the server"):
                server = stack.enter_context(RunningServer(str(args.model), options))
            settings = f"losa, budget {args.token_budget} tokens per query, {args.steps} steps per block of 16"
            console.print(f"server ready on {server.url}: {settings}\n")
            sgl.set_default_backend(sgl.RuntimeEndpoint(server.url, chat_template_name="chatml"))
            produced = frontend_part(console, document, questions)
            compare_part(console, server, document, questions)
    except ServerFailed as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if produced else 1


def pick_questions(document: Document, count: int) -> list[Question]:
    """The first questions of each kind, as evenly as it goes, kinds in their order."""
    by_task = [[q for q in document.questions if q.task == task] for task in TASKS]
    rounds = max(map(len, by_task))
    mixed = [kind[i] for i in range(rounds) for kind in by_task if i < len(kind)]
    return sorted(mixed[:count], key=lambda q: TASKS.index(q.task))


def frontend_part(console: Console, document: Document, questions: list[Question]) -> bool:
    """gen, fork and select through SGLang's frontend. True if every answer was produced."""
    from benchmarks.demo_program import Reply, choices_for, choose_answer, read_and_answer

    replies: list[Reply] = []
    started = time.monotonic()
    with console.status(f"SGLang program: reading the document, {len(questions)} questions in forks"):
        state = read_and_answer.run(document=document.text, questions=questions, replies=replies)
    seconds = time.monotonic() - started
    if state.error() is not None:
        console.print(f"the program failed: {state.error()}", style="red", markup=False)
        return False
    table = Table("kind", "question", "expected", "answer", "", title="SGLang: gen in one fork per question")
    for reply in replies:
        answer = escape(_short(reply.error or reply.text))
        table.add_row(reply.question.task, reply.question.text, reply.question.answer, answer, _mark(reply.right))
    console.print(table)
    run = Run("losa", replies, seconds)
    console.print(_cache_line(run), highlight=False)

    closed = next(q for q in questions if q.task in ("single", "multi_key"))
    choices = choices_for(closed, document, CHOICES, seed=1)
    with console.status("SGLang program: select"):
        state = choose_answer.run(document=document.text, question=closed, choices=choices)
    if state.error() is not None:
        console.print(f"select failed: {state.error()}", style="red", markup=False)
        return False
    console.print(_select_table(closed, choices, state))
    return all(reply.error is None and reply.text for reply in replies)


def compare_part(console: Console, server: RunningServer, document: Document, questions: list[Question]) -> None:
    """The same questions with LoSA and densely, chosen per request on the same server and the same cached pages."""
    runs = []
    for method in ("losa", "dense"):
        with console.status(f"the same questions over HTTP: {method}"):
            first, second = (ask_over_http(server, document, questions, method) for _ in range(2))
            runs.append(min(first, second, key=lambda run: run.seconds))
    table = Table(
        "", *(run.method for run in runs), title="the same questions, the same cached pages, method per request"
    )
    table.caption = "times: the faster of two short runs on a shared machine; the benchmarks measure speed"
    rows: list[tuple[str, list[str]]] = [
        ("right answers", [f"{sum(r.right for r in run.replies)} of {len(run.replies)}" for run in runs]),
        ("KV density (later steps)", [_percent(run.mean("kv_density")) for run in runs]),
        ("active rows (later steps)", [_percent(run.mean("active_share")) for run in runs]),
        ("denoising steps", [str(run.total("denoise_steps")) for run in runs]),
        ("forwards, summed over requests", [str(run.total("forwards")) for run in runs]),
        ("tokens", [str(run.total("completion_tokens")) for run in runs]),
        (
            "tokens per denoising step",
            [_ratio(run.total("completion_tokens"), run.total("denoise_steps")) for run in runs],
        ),
        ("tokens per second", [_ratio(run.total("completion_tokens"), run.seconds) for run in runs]),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    console.print(table)
    losa, dense = (run.mean("kv_density") for run in runs)
    if losa and dense:
        gain = dense / losa
        console.print(
            f"LoSA read [bold]{gain:.1f}x[/] less of the prefix per step than dense attention.", highlight=False
        )
    same = sum(a.text == b.text for a, b in zip(runs[0].replies, runs[1].replies, strict=True))
    console.print(f"{same} of {len(questions)} texts are identical with both methods.", highlight=False)


def ask_over_http(server: RunningServer, document: Document, questions: list[Question], method: str) -> Run:
    """All questions at once, one call each. Raises ServerFailed."""
    from benchmarks.demo_program import ANSWER_TOKENS, Reply

    params = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0, "custom_params": {"sparse_method": method}}

    def ask(question: Question) -> Reply:
        body = {"text": chat_prompt(document.text, question.text), "sampling_params": params}
        answer = server.post("/generate", body)
        return Reply(question, answer["text"].strip(), answer["meta_info"])

    started = time.monotonic()
    with ThreadPoolExecutor(len(questions)) as pool:
        replies = list(pool.map(ask, questions))
    return Run(method, replies, time.monotonic() - started)


def _select_table(question: Question, choices: list[str], state: Any) -> Table:
    table = Table("choice", "mean log-probability", "", title=f"SGLang: select, {question.text}")
    scores = state.get_meta_info("choice")["normalized_prompt_logprobs"]
    for choice, score in zip(choices, scores, strict=True):
        chosen = choice == state["choice"]
        mark = _mark(choice == question.answer) if chosen else ""
        table.add_row(choice, f"{score:.3f}", f"chosen {mark}" if chosen else "")
    return table


def _cache_line(run: Run) -> str:
    cached, prompt = run.total("cached_tokens"), run.total("prompt_tokens")
    share = cached / prompt if prompt else 0.0
    return (
        f"prefix cache: {cached:,} of {prompt:,} prompt tokens ({share:.1%}) came from the cache; "
        f"KV density {_percent(run.mean('kv_density'))}, active rows {_percent(run.mean('active_share'))}, "
        f"{run.total('forwards')} forwards, {run.seconds:.1f} s with the reading\n"
    )


def _short(text: str, limit: int = 90) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _mark(right: bool) -> str:
    return "[green]✓[/]" if right else "[red]✗[/]"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}" if b else "–"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="checkpoint folder (default: the bundled model)")
    parser.add_argument("--tokens", type=int, default=8300, help="length of the document (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=8, help="how many (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps per block (default: %(default)s)")
    parser.add_argument("--token-budget", type=int, default=256, help="of LoSA (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

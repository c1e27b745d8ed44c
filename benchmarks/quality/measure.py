"""Fills in the cells that a file of rows lacks, one task and context at a time: all settings share the prefill."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.quality.rows import RowFile, Samples, measured
from benchmarks.quality.runner import Answer, Runner
from benchmarks.quality.samples import Asked, documents
from benchmarks.quality.settings import Setting


class _Batch(NamedTuple):
    """What is missing of one task and context."""

    task: str
    context: int
    settings: list[Setting]
    documents: list[Asked]

    @property
    def requests(self) -> int:
        return len(self.settings) * sum(len(document.questions) for document in self.documents)


def fill(
    runner: Runner,
    file: RowFile,
    wanted: Mapping[int, Sequence[Setting]],
    tasks: Sequence[str],
    samples: Samples,
    console: Console,
) -> int:
    """Measure what is missing and append it; returns the number of new rows. wanted: settings per context."""
    for settings in wanted.values():
        runner.check(settings, samples.decoding)
    batches = [_missing(file, list(wanted[context]), task, context, samples) for context in wanted for task in tasks]
    batches = [batch for batch in batches if batch.settings]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("answers"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("", total=sum(batch.requests for batch in batches))
        for batch in batches:
            progress.update(bar, description=f"{batch.task}, {batch.context} tokens")
            _measure(runner, file, batch, samples, progress, bar)
    return sum(len(batch.settings) for batch in batches)


def _missing(file: RowFile, settings: list[Setting], task: str, context: int, samples: Samples) -> _Batch:
    there = file.keys
    lacking = [setting for setting in settings if samples.cell(setting, task, context).key not in there]
    drawn = documents(task, context, samples.samples, samples.per_document, samples.seed) if lacking else []
    return _Batch(task, context, lacking, drawn)


def _measure(runner: Runner, file: RowFile, batch: _Batch, samples: Samples, progress: Progress, bar: object) -> None:
    start = time.perf_counter()
    answers: list[list[list[Answer]]] = [[] for _ in batch.settings]
    for document in batch.documents:
        for mine, found in zip(answers, runner.ask(document, batch.settings, samples.decoding), strict=True):
            mine.append(found)
        progress.advance(bar, len(batch.settings) * len(document.questions))  # type: ignore[arg-type]
    seconds = (time.perf_counter() - start) / len(batch.settings)
    cells = [samples.cell(setting, batch.task, batch.context) for setting in batch.settings]
    rows = [measured(cell, mine, seconds, runner.block_length) for cell, mine in zip(cells, answers, strict=True)]
    file.append(rows)
    rate = batch.requests / (seconds * len(rows))
    progress.console.print(
        f"{batch.task}, {batch.context} tokens: {len(rows)} cells of {samples.samples} answers, "
        f"{seconds:.1f} s per cell, {rate:.1f} answers/s"
    )

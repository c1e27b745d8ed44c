"""Fills in the cells that a file of rows lacks, one task and context at a time: all settings share the prefill."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.quality.forced import Forced
from benchmarks.quality.rows import Cell, Row, RowFile, Samples, measured
from benchmarks.quality.runner import Answer, Runner
from benchmarks.quality.samples import LATE_KEY, Asked, documents
from benchmarks.quality.settings import Setting
from losa_runtime.core.batch import SparseParams


class Batch(NamedTuple):
    """Cells of one task and context with the settings that make them."""

    task: str
    context: int
    cells: list[Cell]
    settings: list[Setting]
    resolved: list[SparseParams]


def grid(
    runner: Runner, wanted: Mapping[int, Sequence[Setting]], tasks: Sequence[str], samples: Samples
) -> list[Batch]:
    """All cells of a run; wanted: settings per context. Raises InvalidRequest for what cannot be served."""
    found = []
    for context, settings in wanted.items():
        resolved = [runner.resolve(setting, samples.decoding) for setting in settings]
        for task in tasks:
            pairs = zip(settings, resolved, strict=True)
            cells = [samples.cell(setting, params, task, context) for setting, params in pairs]
            found.append(Batch(task, context, cells, list(settings), resolved))
    return found


def fill(runner: Runner, file: RowFile, batches: Sequence[Batch], samples: Samples, console: Console) -> int:
    """Measure the cells that the file lacks and append them; returns how many."""
    lacking = [batch for batch in (_lacking(file, batch) for batch in batches) if batch.cells]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("answers"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("", total=sum(len(batch.cells) for batch in lacking) * samples.samples)
        for batch in lacking:
            progress.update(bar, description=f"{batch.task}, {batch.context} tokens")
            file.append(_measure(runner, batch, samples, progress, bar))
    return sum(len(batch.cells) for batch in lacking)


def rows(file: RowFile, batches: Sequence[Batch]) -> list[Row]:
    """The rows of the cells, in their order, without those that are not measured yet."""
    there = {row.key: row for row in file.rows}
    return [there[cell.key] for batch in batches for cell in batch.cells if cell.key in there]


def _lacking(file: RowFile, batch: Batch) -> Batch:
    there = file.keys
    left = [i for i, cell in enumerate(batch.cells) if cell.key not in there]
    return Batch(
        batch.task,
        batch.context,
        [batch.cells[i] for i in left],
        [batch.settings[i] for i in left],
        [batch.resolved[i] for i in left],
    )


def _measure(runner: Runner, batch: Batch, samples: Samples, progress: Progress, bar: TaskID) -> list[Row]:
    start = time.perf_counter()
    answers: list[list[list[Answer]]] = [[] for _ in batch.cells]
    forced = Forced(runner) if batch.task == LATE_KEY else None
    for document in _documents(batch, samples):
        if forced is None:
            found = runner.ask(document, batch.settings, samples.decoding)
        else:
            found = forced.ask(document, batch.resolved)
        for mine, new in zip(answers, found, strict=True):
            mine.append(new)
        progress.advance(bar, len(batch.cells) * len(document.questions))
    total = time.perf_counter() - start
    progress.console.print(
        f"{batch.task}, {batch.context} tokens: {len(batch.cells)} cells of {samples.samples} answers, "
        f"{total / len(batch.cells):.1f} s per cell, {len(batch.cells) * samples.samples / total:.1f} answers/s"
    )
    seconds, block = total / len(batch.cells), runner.block_length
    return [measured(cell, mine, seconds, block) for cell, mine in zip(batch.cells, answers, strict=True)]


def _documents(batch: Batch, samples: Samples) -> list[Asked]:
    return documents(batch.task, batch.context, samples.samples, samples.per_document, samples.seed)

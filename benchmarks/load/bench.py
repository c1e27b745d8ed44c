"""Runs cells: starts each server, measures with the body of `losa bench`, and gives a row per cell."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.load.cells import Cell, Stand
from benchmarks.load.prose import Prose
from benchmarks.result_file import circumstances
from losa_runtime.core.errors import LosaError
from losa_runtime.tokenizer import Tokenizer
from losa_server.bench.measure import details
from losa_server.bench.run import measure
from losa_server.bench.running_server import RunningServer

TIMES = ("latencies", "ttfts")  # per request that was answered to its end, for the plots


class CallsFailed(LosaError):
    """Calls of a cell were not answered, so its figures mean nothing."""


def run(model: str, stands: Sequence[Stand], console: Console, url: str | None = None) -> Iterator[dict[str, Any]]:
    """All rows, in order, as they are measured. url: of a running server of that model, instead of the stands' own.

    Raises ServerFailed, ServerUnreachable, and CallsFailed when anything but a hang-up kept a call from its end.
    """
    source, about = Prose(Tokenizer(model)), circumstances(torch.device("cpu"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=sum(len(stand.cells) for stand in stands))
        for stand in stands:
            with _server(model, stand, url) as at:
                for cell in stand.cells:
                    progress.update(bar, description=_title(cell))
                    measured = _measured(at, cell, source)
                    assert cell.labels.keys().isdisjoint(measured)
                    row = {**cell.labels, **measured, **about}
                    yield row
                    progress.advance(bar)
                    if not console.is_terminal:
                        speed, cores = row["output_throughput"], row["engine_cores"]
                        console.print(f"{_title(cell)}: {speed:.1f} tokens/s on {cores:.2f} cores")


@contextmanager
def _server(model: str, stand: Stand, url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with RunningServer(model, (*stand.options, "--log-level", "warning")) as server:
        yield server.url


def _measured(url: str, cell: Cell, source: Prose) -> dict[str, Any]:
    if cell.primed:
        first = cell.settings.model_copy(update={"num_prompts": 1, "random_output_len": 1})
        _answered(cell, asyncio.run(measure(url, None, first, lambda: None, source)))
    busy = os.getloadavg()[0]
    began = time.time()
    found, records = _answered(cell, asyncio.run(measure(url, None, cell.settings, lambda: None, source)))
    about = details([record for record in records if record.completed])
    times = {name: about[name] for name in TIMES}
    return {**found, **times, "model_path": "bundled", "load_average": round(busy, 2), "measured_at": round(began)}


def _answered(cell: Cell, outcome: tuple[dict[str, Any], list[Any]]) -> tuple[dict[str, Any], list[Any]]:
    found, records = outcome
    if found["failed"]:
        reason = next(record.error for record in records if record.error)
        raise CallsFailed(f"{_title(cell)}: {found['failed']} calls failed: {reason}")
    return outcome


def _title(cell: Cell) -> str:
    return " ".join(str(value) for value in cell.labels.values() if not isinstance(value, dict))

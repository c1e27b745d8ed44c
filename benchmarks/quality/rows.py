"""One row per cell (a setting on a task at a context), and the file that keeps them. Knows no engine.

The file is only ever appended to; a run that was stopped goes on where it was. Runs for different contexts may share a
file at the same time.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import torch
from pydantic import BaseModel, ConfigDict

import losa_runtime
from benchmarks.quality.runner import Answer
from benchmarks.quality.settings import Decoding, Setting
from benchmarks.quality.statistics import wilson
from losa_runtime.core.batch import SparseParams
from losa_runtime.sparse.method import method_class

Key = tuple[object, ...]
Option = bool | int | float | str | None


class Cell(BaseModel):
    """What is measured: a setting and the samples it is put to. steps: None = as many as the threshold asks for.

    options: all of the method's, also those that have their default, so that a changed default is another cell.
    share: the budget as a share of the context before rounding to pages; for tables, not part of what is measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    method: str
    options: dict[str, Option]
    budget: int | None
    share: float | None
    task: str
    context: int
    steps: int | None
    threshold: float | None
    samples: int
    per_document: int
    seed: int
    page_size: int

    @property
    def key(self) -> Key:
        """Equal for cells that are the same measurement."""
        fields = self.model_dump(include=set(Cell.model_fields), exclude={"options", "share"})
        return (*fields.values(), *sorted(self.options.items()))


class Row(Cell):
    """A measured cell. Shares lie between 0 and 1; means are over samples that have the figure, None where none has.

    outcomes: right (1) and wrong (0) in the order of the samples, one group per document. ci95: Wilson's, as if
    questions were independent. density_q, density_kv: share of the prefix read in later steps per query head and per KV
    head. active_rows: rows of the block recomputed in a later step. forwards_per_block: denoising steps. bytes_ratio:
    K/V and metadata read in later steps relative to dense; block_bytes_ratio: in all denoising steps. seconds: of the
    run, divided by its cells. versions: of what computed it.
    """

    outcomes: str
    accuracy: float
    ci95: tuple[float, float]
    density_q: float | None
    density_kv: float | None
    active_rows: float | None
    active_overlap: float | None
    forwards_per_block: float | None
    bytes_ratio: float | None
    block_bytes_ratio: float | None
    seconds: float
    commit: str
    versions: dict[str, str]

    @property
    def documents(self) -> list[list[int]]:
        """Outcomes per document and question."""
        return [[int(bit) for bit in group] for group in self.outcomes.split()]


class Samples(BaseModel):
    """Which samples a run draws for each cell, and how they are decoded."""

    model_config = ConfigDict(frozen=True)
    decoding: Decoding
    samples: int
    per_document: int
    seed: int
    page_size: int

    def cell(self, setting: Setting, resolved: SparseParams, task: str, context: int) -> Cell:
        """The cell of a setting. resolved: what the engine makes of it, with the defaults of its day."""
        return Cell(
            name=setting.name,
            method=setting.method,
            options=_options(resolved),
            budget=setting.budget,
            share=setting.share,
            task=task,
            context=context,
            steps=self.decoding.steps,
            threshold=self.decoding.threshold if self.decoding.steps is None else None,
            samples=self.samples,
            per_document=self.per_document,
            seed=self.seed,
            page_size=self.page_size,
        )


def measured(cell: Cell, answers: Sequence[Sequence[Answer]], seconds: float, block_length: int) -> Row:
    """The row of a cell from its answers per document."""
    flat = [answer for document in answers for answer in document]
    right = sum(answer.right for answer in flat)
    assert len(flat) == cell.samples
    stats = [answer.stats for answer in flat]
    active = _mean(s.active_share for s in stats)
    return Row(
        **cell.model_dump(),
        outcomes=" ".join("".join(str(int(answer.right)) for answer in document) for document in answers),
        accuracy=right / len(flat),
        ci95=wilson(right, len(flat)),
        density_q=_mean(s.kv_density_q for s in stats),
        density_kv=_mean(s.kv_density for s in stats),
        active_rows=None if active is None else active * block_length,
        active_overlap=_mean(s.active_overlap for s in stats),
        forwards_per_block=_mean(s.denoise_steps / s.blocks if s.blocks else None for s in stats),
        bytes_ratio=_mean(s.bytes_ratio for s in stats),
        block_bytes_ratio=_mean(s.block_bytes_ratio for s in stats),
        seconds=seconds,
        commit=commit(),
        versions=versions(),
    )


class RowFile:
    """Rows on disk, a JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [Row.model_validate_json(line) for line in lines if line]

    @property
    def keys(self) -> set[Key]:
        """Of what is there."""
        return {row.key for row in self.rows}

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows, on disk first."""
        new = list(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(row.model_dump_json() + "\n" for row in new)
        with self.path.open("ab", buffering=0) as file:
            file.write(lines.encode())  # in one piece: another run may append to the same file
        self.rows += new


def _options(resolved: SparseParams) -> dict[str, Option]:
    """All options of the method, given or not, and the rule for active rows where it has one."""
    options = dict(resolved.options.model_dump())
    if method_class(resolved.method).has_active_rows:
        options[f"active_{resolved.active.kind}"] = resolved.active.value
    return options


def commit() -> str:
    """Short name of the commit that is checked out, marked where the runtime differs from it; "unknown" outside git."""
    root = Path(losa_runtime.__file__).parents[1]

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "losa_runtime", "kernels")
        return git("rev-parse", "--short", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Of the runtime and what it computes with."""
    python = ".".join(str(part) for part in sys.version_info[:3])
    return {"losa_runtime": losa_runtime.__version__, "torch": torch.__version__, "python": python}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None

"""What the attention benchmark measures: the table of variants, how one of each is run, and what it cannot undercut.

A variant is a line of `variants`. Knows nothing of rounds, medians and printing.
T denoising steps, S requests, B block length, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.attention_ceiling import Ceiling
from benchmarks.attention_world import LAYERS, Forward, Setting, World
from losa_runtime.core.batch import ForwardMode
from losa_runtime.sparse.density import SegmentReport

OPEN, DENOISE, COMMIT = ForwardMode.OPEN, ForwardMode.DENOISE, ForwardMode.COMMIT


class Work(Enum):
    STEP = "later denoising step"
    BLOCK = "block: commit with the next opening step in one forward, then the later steps"
    UNFUSED = "block: commit, opening step and later steps in forwards of their own"


@dataclass(frozen=True)
class Variant:
    """method: None = torch's attention. queries: name of the query set. requests: how many, None = all of `batch`.
    backend: None = the usual one."""

    name: str
    method: str | None
    work: Work = Work.STEP
    queries: str = "wide"
    requests: int | None = None
    batch: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    backend: str | None = None


class Need(NamedTuple):
    """Bytes that have to be read, and FLOPs by rows of a query tile."""

    bytes: float
    flops: dict[int, float]

    def seconds(self, ceiling: Ceiling) -> float:
        """Least time on a machine with this ceiling; rows count at the nearest rate that was measured."""
        flops: dict[int, float] = {}
        for rows, count in self.flops.items():
            nearest = min(ceiling.gemm, key=lambda known: abs(known - rows))
            flops[nearest] = flops.get(nearest, 0.0) + count
        return ceiling.seconds(self.bytes, flops)


class Sample(NamedTuple):
    """One measurement: seconds in all and by part, least work by part, share of the prefix read per KV head. host:
    seconds until the host had asked for all of it."""

    seconds: float
    parts: dict[str, float]
    needs: dict[str, Need]
    density: float
    host: float


def variants(sets: Sequence[str], batch: int, base: str = "sdpa") -> list[Variant]:
    """The table. sets: the query sets, the one that counts first; it is also that of the blocks. base: what all is
    compared with: torch's attention, another backend's dense one, or, called "dense", that of the usual backend."""
    yardstick: dict[str, dict[str, Any]] = {"sdpa": {"method": None}, "dense": {}}
    about = yardstick.get(base, {"method": "dense", "backend": base})
    table = [
        *([Variant(f"{base}_step", **about)] if about else []),
        Variant("dense_step", "dense"),
        Variant("mage_step", "mage"),
        *(Variant(_on("quest_step", each, sets), "quest", queries=each) for each in sets),
        *(Variant(_on("losa_step", each, sets), "losa", queries=each) for each in sets),
        *(Variant(_on("losa_plus_step", each, sets), "losa_plus", queries=each) for each in sets),
        *([Variant(f"{base}_block", work=Work.BLOCK, **about)] if about else []),
        Variant("dense_block", "dense", Work.BLOCK),
        Variant("losa_block", "losa", Work.BLOCK),
        Variant("losa_block_unfused", "losa", Work.UNFUSED),
        Variant("losa_plus_block", "losa_plus", Work.BLOCK),
    ]
    table = [replace(variant, batch=batch) for variant in table]
    steps = [variant for variant in table if variant.work is Work.STEP and variant.queries == sets[0]]
    return table + [replace(variant, name=f"{variant.name}_single", requests=1) for variant in steps if batch > 1]


def _on(name: str, queries: str, sets: Sequence[str]) -> str:
    return name if queries == sets[0] else f"{name}_{queries}"


class Runner:
    """A variant in its own slots. queries: [T, S, B, H, D]."""

    def __init__(self, world: World, variant: Variant, queries: Tensor, slot: int) -> None:
        self._world, self._variant, self._slot, self._turn = world, variant, slot, 0
        self._requests = variant.requests or world.setting.batch
        self._queries = queries[:, : self._requests]
        self._params = None if variant.method is None else world.params(variant.method, variant.options)
        if variant.method is not None and variant.work is Work.STEP:
            self._forward((OPEN,), world.setting.context, 0)

    def sample(self) -> Sample:
        """Measure once."""
        self._turn += 1
        if self._variant.method is None:
            return self._sdpa()
        if self._variant.work is Work.STEP:
            step = 1 + self._turn % (len(self._queries) - 1)
            return self._sum([(0, self._forward((DENOISE,), self._world.setting.context, step))])
        return self._sum(list(self._block()))

    def _sdpa(self) -> Sample:
        setting = self._world.setting
        steps = range(len(self._queries)) if self._variant.work is not Work.STEP else [self._turn % len(self._queries)]
        seconds = [self._world.sdpa(self._queries[step]) for step in steps]
        if self._variant.work is not Work.STEP:
            seconds.append(self._world.sdpa(self._queries[0]))  # the commit
        total = sum(seconds)
        need = dense_need(setting, self._requests * len(seconds))
        return Sample(total, {"attention": total}, {"attention": need}, 1.0, total)

    def _block(self) -> Iterable[tuple[int, Forward]]:
        """Forwards of a block, with the blocks stored in each. It begins behind the one that is committed."""
        setting = self._world.setting
        self._world.release(self._slot, self._requests)
        if self._variant.work is Work.BLOCK:
            yield self._requests, self._forward((COMMIT, OPEN), setting.context, 0)
        else:
            yield self._requests, self._forward((COMMIT,), setting.context, 0)
            yield 0, self._forward((OPEN,), setting.context + setting.block, 0)
        for step in range(1, len(self._queries)):
            yield 0, self._forward((DENOISE,), setting.context + setting.block, step)

    def _forward(self, modes: tuple[ForwardMode, ...], start: int, step: int) -> Forward:
        assert self._params is not None
        rows = torch.cat([self._queries[step]] * len(modes))
        return self._world.forward(rows, modes, start, self._slot, step, self._params, self._variant.backend)

    def _sum(self, forwards: list[tuple[int, Forward]]) -> Sample:
        setting, parts = self._world.setting, dict[str, float]()
        for _, forward in forwards:
            for part, seconds in forward.parts.items():
                parts[part] = parts.get(part, 0.0) + seconds
        seconds = sum(forward.seconds for _, forward in forwards)
        parts["host"] = seconds - sum(parts.values())
        reports = [report for _, forward in forwards for report in forward.reports]
        stored = dense_need(setting, sum(count for count, _ in forwards))
        attention = _add([stored, *(_attention(setting, report) for report in reports)])
        selection = _add([_selection(setting, report) for report in reports])
        needs = {"attention": attention, "selection": selection, "block+merge": _finish(setting, len(reports))}
        host = sum(forward.host for _, forward in forwards)
        return Sample(seconds, parts, needs, sum(r.kv_density for r in reports) / len(reports), host)


def dense_need(setting: Setting, passes: int) -> Need:
    """That of whole prefixes with all rows of a block, so many times."""
    length = setting.context + setting.block
    rows = setting.block * setting.heads // setting.kv_heads
    flops = 4.0 * setting.dim * setting.heads * setting.block * length
    return Need(2.0 * passes * length * setting.kv_heads * setting.dim * setting.dtype.itemsize, {rows: passes * flops})


def _attention(setting: Setting, report: SegmentReport) -> Need:
    rows = report.active_rows
    flops = 4.0 * setting.dim * setting.heads * rows * report.kv_density * report.segment.prefix_len
    return Need(report.kv_bytes / LAYERS, {_tile(setting, rows): flops})


def _selection(setting: Setting, report: SegmentReport) -> Need:
    read = report.metadata_bytes / LAYERS
    numbers = read / setting.dtype.itemsize
    flops = 2.0 * numbers * report.active_rows * setting.heads / setting.kv_heads
    return Need(read, {_tile(setting, report.active_rows): flops})


def _finish(setting: Setting, blocks: int) -> Need:
    """Attention inside blocks and the merge: their K/V, and a prefix state per row and head, fresh or remembered."""
    states = setting.block * setting.heads * (setting.dim + 1) * 4
    kv = 2 * setting.block * setting.kv_heads * setting.dim * setting.dtype.itemsize
    flops = 4.0 * setting.dim * setting.heads * setting.block**2
    return Need(float(blocks * (states + kv)), {_tile(setting, setting.block): blocks * flops})


def _tile(setting: Setting, rows: float) -> int:
    return max(1, round(rows * setting.heads / setting.kv_heads))


def _add(needs: Iterable[Need]) -> Need:
    total, flops = 0.0, dict[int, float]()
    for need in needs:
        total += need.bytes
        for rows, count in need.flops.items():
            flops[rows] = flops.get(rows, 0.0) + count
    return Need(total, flops)

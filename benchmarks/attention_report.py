"""What the attention benchmark prints: the ceiling, the queries, the times and their parts; the figures for JSON.

Ratios are of medians, `ratios_best` of the best times. Measures nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.attention_ceiling import Ceiling
from benchmarks.attention_variants import Sample, Variant, Work

Samples = dict[str, list[Sample]]


def say_ceiling(console: Console, ceiling: Ceiling, queries: dict[str, Any]) -> None:
    """What the machine can do, and what the rows of the query sets select."""
    rates = ", ".join(f"{rate / 1e9:.0f} with {rows} rows" for rows, rate in ceiling.gemm.items())
    console.print(f"read {ceiling.read / 1e6:,.0f} MB/s; products, GFLOP/s: {rates}; load {os.getloadavg()[0]:.1f}")
    for name, each in queries.items():
        per_head = " ".join(f"{100 * share:.1f}" for share in each["union_active_per_kv_head"])
        growth = " ".join(f"{share:.2f}" for share in each["growth"])
        console.print(
            f"queries '{name}': the active rows select {each['union_active']:.1%} of the pages (per KV head, %: "
            f"{per_head}), all rows {each['union_all']:.1%}; growth with the rows: {growth}"
        )


def say_times(console: Console, chosen: Sequence[Variant], samples: Samples, ceiling: Ceiling, base: str) -> None:
    """A table of times, and one of their parts. base: see `variants`."""
    columns = ("variant", "ms", "best", "spread", f"x {base}", "least ms", "of ceiling", "prefix read")
    times = Table(*columns, title="median times; least: from bytes, FLOPs and the ceiling")
    middle = {name: _middle(each) for name, each in samples.items()}
    names = list(dict.fromkeys(part for each in samples.values() for part in each[-1].parts))
    parts = Table("variant", *names, title="parts, ms (in brackets: least over measured)")
    for variant in chosen:
        name, each, yardstick = variant.name, samples[variant.name], _base(variant, base)
        floor = _floor(each[-1], ceiling)
        ratio = f"{middle[yardstick] / middle[name]:.2f}" if yardstick in middle else "-"
        figures = (f"{1e3 * middle[name]:.2f}", f"{1e3 * _best(each):.2f}", f"{_spread(each):.0%}", ratio)
        density = f"{each[-1].density:.1%}"
        times.add_row(name, *figures, f"{1e3 * floor:.2f}", f"{floor / middle[name]:.0%}", density)
        parts.add_row(name, *(_part(each, part, ceiling) for part in names))
    console.print(times)
    console.print(parts)


def figures(chosen: Sequence[Variant], samples: Samples, ceiling: Ceiling, base: str) -> dict[str, Any]:
    """Everything that was measured, for JSON. base: see `variants`. Parts are those of the paper's breakdown: change is
    its selection by locality, selection its estimation of criticality; then attention and merge."""
    middle = {name: _middle(each) for name, each in samples.items()}
    best = {name: _best(each) for name, each in samples.items()}
    least = {name: _floor(each[-1], ceiling) for name, each in samples.items()}
    return {
        "ratios": ratios(chosen, middle, base),
        "ratios_best": ratios(chosen, best, base),
        "ceiling_share": _shares(samples, ceiling),
        "ms": _milliseconds(middle),
        "ms_best": _milliseconds(best),
        "ms_least": _milliseconds(least),
        "ms_host": _milliseconds({name: median(s.host for s in each) for name, each in samples.items()}),
        "ms_parts": {name: _parts(each) for name, each in samples.items()},
        "MB": {name: round(sum(n.bytes for n in each[-1].needs.values()) / 1e6, 2) for name, each in samples.items()},
        "spread": {name: round(_spread(each), 3) for name, each in samples.items()},
        "prefix_read": {name: round(each[-1].density, 4) for name, each in samples.items()},
        "block_ceiling": _block_ceiling(middle, base),
        "read_MB_s": round(ceiling.read / 1e6),
        "gemm_GFLOP_s": {rows: round(rate / 1e9, 1) for rows, rate in ceiling.gemm.items()},
        "load": round(os.getloadavg()[0], 1),
    }


def ratios(chosen: Sequence[Variant], seconds: dict[str, float], base: str = "sdpa") -> dict[str, float]:
    """How many times faster than the yardstick each variant is, than quest, and how well requests share a call."""
    found: dict[str, float] = {}
    for variant in chosen:
        name, yardstick = variant.name, _base(variant, base)
        if name != yardstick and yardstick in seconds:
            found[f"{'dense' if name == 'dense_step' else name}_vs_{base}"] = seconds[yardstick] / seconds[name]
        quest = name.replace(variant.method or "", "quest", 1)
        if variant.method not in (None, "dense", "quest") and variant.work is Work.STEP and quest in seconds:
            found[f"{name}_vs_quest"] = seconds[quest] / seconds[name]
        if variant.requests is None and f"{name}_single" in seconds:
            found[f"{name}_batch_efficiency"] = seconds[f"{name}_single"] * variant.batch / seconds[name]
    return {name: round(value, 3) for name, value in found.items()}


def _milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(1e3 * value, 3) for name, value in seconds.items()}


def _middle(samples: list[Sample]) -> float:
    return median(sample.seconds for sample in samples)


def _best(samples: list[Sample]) -> float:
    return min(sample.seconds for sample in samples)


def _spread(samples: list[Sample]) -> float:
    """Half of the samples lie within this share of the median."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = quantiles([sample.seconds for sample in samples], n=4)
    return (high - low) / middle


def _base(variant: Variant, base: str) -> str:
    """The name of what a variant is compared with."""
    kind = "step" if variant.work is Work.STEP else "block"
    return f"{base}_{kind}" if variant.requests is None else f"{base}_{kind}_single"


def _parts(samples: list[Sample]) -> dict[str, float]:
    names = dict.fromkeys(part for sample in samples for part in sample.parts)
    return _milliseconds({part: median(sample.parts.get(part, 0.0) for sample in samples) for part in names})


def _floor(sample: Sample, ceiling: Ceiling) -> float:
    return sum(need.seconds(ceiling) for need in sample.needs.values())


def _part(samples: list[Sample], part: str, ceiling: Ceiling) -> str:
    measured = median(sample.parts.get(part, 0.0) for sample in samples)
    need = samples[-1].needs.get(part)
    share = f" ({need.seconds(ceiling) / measured:.0%})" if need and need.bytes and measured else ""
    return f"{1e3 * measured:.2f}{share}" if measured else "-"


def _shares(samples: Samples, ceiling: Ceiling) -> dict[str, float]:
    """Least over measured time, by variant and part."""
    shares = {}
    for name, each in samples.items():
        for part, need in each[-1].needs.items():
            measured = median(sample.parts.get(part, 0.0) for sample in each)
            if need.bytes and measured:
                shares[f"{name}.{part}"] = round(need.seconds(ceiling) / measured, 3)
    return shares


def _block_ceiling(seconds: dict[str, float], base: str) -> float | None:
    """What a block of 16 steps and the commit can gain at most: two dense passes, commit and opening step, and later
    steps as fast as measured, against 17 dense passes.
    """
    if not {f"{base}_step", "losa_step"} <= seconds.keys():
        return None
    return round(17 / (2 + 15 * seconds["losa_step"] / seconds[f"{base}_step"]), 2)

"""Figures for people: one table, and the reasons of what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from losa_server.bench.calls import Record

# title, key stem
TIMES = (
    ("request", "e2e_latency"),
    ("first block", "ttft"),
    ("from block to block", "block"),
    ("per token behind it", "tpot"),
)


def show(console: Console, result: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Print the result."""
    loop = "closed loop" if result["request_rate"] == "inf" else f"{result['request_rate']:g} arrivals per s"
    limit = result["max_concurrency"]
    if result["burst_size"] > 1:
        loop += f", {result['burst_size']} together"
    about = f"{loop}, " + (f"at most {limit} at once" if limit else "no limit at once")
    console.print(_rates(result, f"{result['dataset_name']}: {about}"))
    console.print(_times(result))
    for reason, count in Counter(record.error for record in records if record.error).most_common(5):
        console.print(f"{count} failed: {reason}", style="red", markup=False, highlight=False)


def _rates(result: Mapping[str, Any], title: str) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    asked = result["completed"] + result["failed"] + result["abandoned"]
    rows = [
        ("completed", f"{result['completed']} of {asked} in {result['duration']:.1f} s"),
        ("requests per s", f"{result['request_throughput']:.2f}"),
        ("output tokens per s", f"{result['output_throughput']:,.1f}"),
        ("prompt tokens per s", f"{result['input_throughput']:,.1f}"),
        ("requests at once, mean", f"{result['concurrency']:.1f}"),
        ("tokens per forward", _number(result["tokens_per_forward"])),
        ("tokens per denoising step", _number(result["tokens_per_step"])),
        ("forwards per block", _number(result["forwards_per_block"])),
        ("prompt tokens from the cache", _percent(result["cache_hit_rate"])),
        ("KV density, later steps", _percent(result["kv_density"])),
        ("active rows, later steps", _percent(result["active_share"])),
        ("host's share of the engine's time", _percent(result["host_share"])),
    ]
    if result["goodput"] is not None:
        rows.append(("good requests per s", f"{result['goodput']:.2f} ({_percent(result['good_share'])})"))
    for name, text in rows:
        table.add_row(name, text)
    return table


def _times(result: Mapping[str, Any]) -> Table:
    table = Table("ms", "mean", "p50", "p95", "p99")
    for column in table.columns[1:]:
        column.justify = "right"
    for title, stem in TIMES:
        keys = [f"{kind}_{stem}_ms" for kind in ("mean", "p50", "p95", "p99")]
        table.add_row(title, *(_number(result[key], 1) for key in keys))
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"

"""Rows as tables for people, and the few numbers that sum them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.load.cells import AXES

Row = dict[str, Any]
# Tokens per second of processor time: what others do on the machine meanwhile changes it little.
SPEED = "tokens_per_cpu_s"


def workloads(rows: Sequence[Row], console: Console) -> None:
    """One line per workload and method."""
    names = (
        "tokens/s",
        "per CPU s",
        "requests/s",
        "first block p50",
        "p95",
        "block p50",
        "request p50",
        "p99",
        "tokens/forward",
    )
    table = Table("workload", "method", *names, "from cache", "KV density", "host", "goodput", title="under load (ms)")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        times = ("p50_ttft_ms", "p95_ttft_ms", "p50_block_ms", "p50_e2e_latency_ms", "p99_e2e_latency_ms")
        table.add_row(
            row["name"],
            row["method"],
            _number(row["output_throughput"], 0),
            _number(row[SPEED], 0),
            _number(row["request_throughput"], 1),
            *(_number(row[name], 0) for name in times),
            _number(row["tokens_per_forward"], 1),
            *(_percent(row[name]) for name in ("cache_hit_rate", "kv_density", "host_share")),
            _number(row["goodput"], 2),
        )
    console.print(table)


def growth(rows: Sequence[Row], console: Console) -> None:
    """One table per axis: speed of both methods side by side, what LoSA read, and memory."""
    for axis, title in AXES.items():
        speeds = [f"{method}, {unit}" for unit in ("tokens/s", "per CPU s") for method in ("dense", "LoSA")]
        table = Table(title, *speeds, "LoSA / dense", "KV read", "KV cache MiB", "engine MiB", "cores")
        for column in table.columns:
            column.justify = "right"
        for value, pair in pairs(rows, axis).items():
            losa, both = pair["losa"], [pair.get("dense"), pair["losa"]]
            texts = [
                _number(None if row is None else row[name], 1) for name in ("output_throughput", SPEED) for row in both
            ]
            ratio = ratio_of(pair) if len(pair) == 2 else None
            memory = (_number(row_mib(losa, name), 0) for name in ("kv_bytes_held", "engine_rss_bytes"))
            more = (_number(ratio, 2), _percent(losa["kv_density"]), *memory, _number(losa["engine_cores"], 2))
            table.add_row(f"{value:,}", *texts, *more)
        console.print(table)


def pairs(rows: Sequence[Row], axis: str) -> dict[int, dict[str, Row]]:
    """Rows along an axis: value -> method without its budget -> row."""
    found: dict[int, dict[str, Row]] = {}
    for row in rows:
        if row["axis"] == axis:
            found.setdefault(row["value"], {})[row["method"].partition(":")[0]] = row
    return found


def ratio_of(pair: Mapping[str, Row]) -> float:
    """Speed of LoSA over that of dense attention."""
    return float(pair["losa"][SPEED] / pair["dense"][SPEED])


def ratios(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The same along each axis that has both."""
    found = {
        axis: {str(value): round(ratio_of(pair), 2) for value, pair in pairs(rows, axis).items() if len(pair) == 2}
        for axis in AXES
    }
    return {axis: values for axis, values in found.items() if values}


def host_share(rows: Sequence[Row]) -> dict[str, float]:
    """By method, of the cells with 32 requests at once."""
    return {row["method"]: round(row["host_share"], 4) for row in rows if row["max_concurrency"] == 32}


def row_mib(row: Row, name: str) -> float | None:
    """Bytes of a row in MiB."""
    return None if row[name] is None else row[name] / 2**20


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"

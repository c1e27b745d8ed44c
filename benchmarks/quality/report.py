"""Tables of rows and claims for people. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.quality.claims import Claim
from benchmarks.quality.pools import Pool, pools
from benchmarks.quality.rows import Row
from benchmarks.quality.samples import LATE_KEY, TASKS

COLOURS = {"holds": "green", "does not hold": "red", "not decided": "yellow"}


def tables(rows: Sequence[Row], console: Console) -> None:
    """One table per context."""
    for context in sorted({row.context for row in rows}):
        console.print(_table([row for row in rows if row.context == context], context))
    commits = sorted({row.commit for row in rows})
    if len(commits) > 1:
        console.print(f"[yellow]The rows were measured at different commits: {', '.join(commits)}[/]")


def verdicts(claims: Sequence[Claim], console: Console) -> None:
    """The claims with what became of them."""
    table = Table("claim", "verdict", "because", title="claims", show_lines=True)
    for claim in claims:
        table.add_row(claim.statement, f"[{COLOURS[claim.verdict]}]{claim.verdict}[/]", claim.because)
    console.print(table)


def write_claims(claims: Sequence[Claim], path: Path) -> None:
    """As JSON, figures included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([claim.model_dump() for claim in claims], indent=1) + "\n")


def _table(rows: Sequence[Row], context: int) -> Table:
    tasks = [task for task in TASKS if any(row.task == task for row in rows)]
    samples = "/".join(str(n) for n in sorted({row.samples for row in rows}))
    table = Table(
        title=f"{context:,} tokens, {samples} answers per cell; figures of later steps but the last, without late_key"
    )
    for name in ("method", "budget", *tasks, "mean", "density q", "density KV", "active rows", "steps/block"):
        table.add_column(name, justify="left" if name in ("method", "budget") else "right")
    table.add_column("bytes", justify="right")
    table.add_column("bytes, whole blocks", justify="right")
    last = ""
    for pool in pools(rows):
        if last and pool.name != last:
            table.add_section()
        table.add_row(pool.name if pool.name != last else "", pool.strength.label, *_cells(pool, tasks, context))
        last = pool.name
    return table


def _cells(pool: Pool, tasks: Sequence[str], context: int) -> list[str]:
    right = [pool.rows.get((task, context)) for task in tasks]
    questions = {place: row for place, row in pool.rows.items() if row.task != LATE_KEY}
    pool = pool._replace(rows=questions or pool.rows)
    return [
        *("-" if row is None else f"{row.accuracy:.0%}" for row in right),
        f"{pool.accuracy:.1%}",
        _percent(pool.mean(lambda row: row.density_q)),
        _percent(pool.mean(lambda row: row.density_kv)),
        _number(pool.mean(lambda row: row.active_rows)),
        _number(pool.mean(lambda row: row.forwards_per_block)),
        _percent(pool.mean(lambda row: row.bytes_ratio)),
        _percent(pool.mean(lambda row: row.block_bytes_ratio)),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

"""The plots: latencies as distributions, and throughput along each axis. Measures nothing.

Imports matplotlib when it draws, as it is not needed to measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.load.cells import AXES
from benchmarks.load.tables import SPEED, Row, pairs, ratio_of, row_mib
from benchmarks.quality.plots import style


def latencies(rows: Sequence[Row], path: Path) -> None:
    """Share of the requests that were answered within a time, a panel per workload; thin: their first blocks."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    columns = 5
    figure, axes = _panels((len(names) + columns - 1) // columns, columns)
    for panel, name in zip(axes, names, strict=False):
        for row in (row for row in rows if row["name"] == name):
            line = {**style(row["method"].partition(":")[0]), "marker": ""}
            _steps(panel, row["latencies"], label=row["method"], **line)
            _steps(panel, row["ttfts"], **{**line, "linewidth": 0.8, "linestyle": ":"})
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("seconds", fontsize=8)
        panel.set_xlim(left=0)
        panel.yaxis.set_major_formatter("{x:.0%}")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7, frameon=False, loc="lower right")
    for panel in axes[len(names) :]:
        panel.set_visible(False)
    axes[0].set_ylabel("answered (dotted: first block)", fontsize=8)
    _save(figure, path)


def growth(rows: Sequence[Row], path: Path) -> None:
    """Speed along each axis for both methods, their ratio, and the memory of the K/V."""
    figure, axes = _panels(2, len(AXES))
    for number, (axis, title) in enumerate(AXES.items()):
        points, top, bottom = pairs(rows, axis), axes[number], axes[number + len(AXES)]
        for method in ("dense", "losa"):
            mine = {value: pair[method] for value, pair in points.items() if method in pair}
            if mine:
                top.plot(list(mine), [row[SPEED] for row in mine.values()], label=method, **style(method))
        both = {value: pair for value, pair in points.items() if len(pair) == 2}
        if both:
            ratio = [ratio_of(pair) for pair in both.values()]
            bottom.plot(list(both), ratio, label="LoSA / dense", **style("losa"))
            bottom.axhline(1.0, color="black", linewidth=0.6, linestyle=":")
        else:
            density = [pair["losa"]["kv_density"] for pair in points.values()]
            bottom.plot(list(points), density, label="KV density", **style("losa"))
        bottom.set_ylim(bottom=0)
        top.set_ylim(bottom=0)
        _memory(bottom, {value: row_mib(pair["losa"], "kv_bytes_held") for value, pair in points.items()})
        for panel in (top, bottom):
            panel.set_xscale("log", base=2)
            panel.set_xticks(list(points), [_short(value) for value in points], fontsize=7)
            panel.grid(alpha=0.25)
            panel.legend(fontsize=7, frameon=False)
        top.set_title(_title(rows, axis), fontsize=8)
        bottom.set_xlabel(title, fontsize=8)
    axes[0].set_ylabel("output tokens per CPU second", fontsize=8)
    _save(figure, path)


def _memory(panel: Any, points: dict[int, float | None]) -> None:
    other = panel.twinx()
    other.plot(list(points), list(points.values()), color="#999999", linewidth=0.8, linestyle="--")
    other.set_ylim(bottom=0)
    other.set_ylabel("K/V cache, MiB (dashed)", fontsize=7, color="#777777")
    other.tick_params(labelsize=7, colors="#777777")


def _title(rows: Sequence[Row], axis: str) -> str:
    row = next(row for row in rows if row["axis"] == axis)
    rest = {
        "context": "{:,} tokens",
        "concurrency": "{} at once",
        "budget": "budget {}",
        "block_length": "blocks of {}",
    }
    return ", ".join(text.format(row["at"][name]) for name, text in rest.items() if name != axis)


def _short(value: int) -> str:
    return f"{round(value / 1024)}K" if value >= 1024 else str(value)


def _steps(panel: Any, seconds: Sequence[float | None], **line: Any) -> None:
    known = sorted(value for value in seconds if value is not None)
    if known:
        panel.step([0.0, *known], [i / len(known) for i in range(len(known) + 1)], where="post", **line)


def _panels(lines: int, columns: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(lines, columns, figsize=(3.2 * columns, 2.7 * lines), squeeze=False)
    return figure, list(axes.flat)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

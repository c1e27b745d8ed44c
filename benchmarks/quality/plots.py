"""The Pareto plot: accuracy against bytes, a panel per context. Measures nothing.

Imports matplotlib when it draws, as it is not needed to measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.claims import BYTES, Bytes
from benchmarks.quality.pools import DENSE, named, pools
from benchmarks.quality.rows import Row
from benchmarks.quality.samples import LATE_KEY

# One colour and marker per name wherever it is drawn.
STYLES: dict[str, tuple[str, str]] = {
    "dense": ("black", "*"),
    "quest": ("#d95f02", "o"),
    "losa": ("#1f78b4", "s"),
    "losa_plus": ("#e7298a", "D"),
    "mage": ("#33a02c", "^"),
    "sparsed": ("#6a3d9a", "v"),
    "sparse_dllm": ("#b15928", "<"),
    "ba_att": ("#a6761d", ">"),
    "flashblock": ("#666666", "P"),
    "quest_dense_first": ("#fdb462", "x"),
}


def style(name: str) -> dict[str, Any]:
    """Keywords for a line."""
    colour, marker = STYLES.get(name, ("#999999", "."))
    return {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.2, "alpha": 0.85}


def pareto(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against bytes relative to dense, in later steps and in whole blocks, of questions and of late keys."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    questions, late = [row for row in rows if row.task != LATE_KEY], [row for row in rows if row.task == LATE_KEY]
    lines = [("questions", kind, questions) for kind in BYTES] + [("late keys", kind, late) for kind in BYTES]
    lines = [line for line in lines if line[2]]
    contexts = sorted({row.context for row in rows})
    size = (3.6 * len(contexts) + 1.2, 3.2 * len(lines) + 0.4)
    figure, axes = pyplot.subplots(len(lines), len(contexts), figsize=size, squeeze=False, sharex="row")
    for line, (what, kind, mine) in zip(axes, lines, strict=True):
        for panel, context in zip(line, contexts, strict=True):
            _panel(panel, [row for row in mine if row.context == context], BYTES[kind])
            panel.set_xlabel(f"bytes read relative to dense, {kind}", fontsize=8)
            panel.set_title(f"{what}, {context:,} tokens", fontsize=9)
        line[0].set_ylabel("right answers")
    handles, labels = axes[0][0].get_legend_handles_labels()
    columns = 5 if len(contexts) > 1 else 3
    figure.legend(handles, labels, loc="lower center", ncol=columns, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, (0.2 + 0.2 * -(-len(labels) // columns)) / size[1], 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _panel(panel: Any, rows: Sequence[Row], bytes_of: Bytes) -> None:
    every = pools(rows)
    for name in dict.fromkeys(pool.name for pool in every):
        points = [(size, pool.accuracy) for pool in named(every, name) if (size := pool.mean(bytes_of)) is not None]
        panel.plot([x for x, _ in points], [y for _, y in points], label=name, **style(name))
    for dense in named(every, DENSE):
        panel.axhline(dense.accuracy, color="black", linewidth=0.6, linestyle=":")
    panel.set_xscale("symlog", linthresh=0.01)  # FlashBlock may read nothing
    panel.set_ylim(-0.04, 1.04)
    panel.grid(alpha=0.25)
    panel.yaxis.set_major_formatter("{x:.0%}")
    panel.xaxis.set_major_formatter("{x:.0%}")

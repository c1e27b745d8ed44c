"""Pictures of the probe's figures. Imports matplotlib when it draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.plots import style
from benchmarks.quality.probe.figures import Figures, Outcome
from benchmarks.quality.probe.locality import WHAT

ERROR_SHARE = 0.03  # of the context: the budget whose errors are drawn


def draw(figures: Figures, stem: Path) -> list[Path]:
    """All pictures beside `stem`; returns where they are."""
    import matplotlib

    matplotlib.use("Agg")
    parts = {"cloze": _cloze, "error": _error, "union": _union, "locality": _locality}
    paths = []
    for name, make in parts.items():
        path = stem.with_name(f"{stem.stem}_{name}.png")
        picture = make(figures)
        picture.savefig(path, dpi=140)
        matplotlib.pyplot.close(picture)
        paths.append(path)
    return paths


def _cloze(figures: Figures) -> Any:
    """Perplexity of the true tokens against bytes of the later steps."""
    panels = _places(figures.outcomes)
    picture, axes = _grid(1, len(panels))
    for panel, (kind, context) in zip(axes[0], panels, strict=True):
        mine = [o for o in figures.outcomes if (o.kind, o.context) == (kind, context)]
        for name in dict.fromkeys(o.name for o in mine):
            points = sorted((o.bytes_ratio, o.perplexity) for o in mine if o.name == name)
            panel.plot(*zip(*points, strict=True), label=name, **style(name))
        panel.set_xscale("symlog", linthresh=0.01)
        panel.set_yscale("log")
        _label(panel, f"{kind}, {context:,} tokens", "bytes of later steps relative to dense", "cloze perplexity")
    return _finish(picture, axes[0][0], 5)


def _error(figures: Figures) -> Any:
    """Relative error of the attention to the prefix by step (mean over layers) and by layer (mean over later steps)."""
    panels = _places(figures.outcomes)
    picture, axes = _grid(2, len(panels))
    for column, (kind, context) in enumerate(panels):
        for outcome in _shown(figures.outcomes, kind, context):
            error = np.array(outcome.prefix_error)
            axes[0][column].plot(range(error.shape[0]), error.mean(1), label=outcome.name, **style(outcome.name))
            axes[1][column].plot(range(error.shape[1]), error[1:].mean(0), **style(outcome.name))
            axes[1][column].set_xticks(range(error.shape[1]))
        title = f"{kind}, {context:,} tokens, budget {ERROR_SHARE:.0%}"
        _label(axes[0][column], title, "denoising step", "relative L2 error, prefix attention")
        _label(axes[1][column], title, "layer", "relative L2 error, later steps")
    return _finish(picture, axes[0][0], 5)


def _union(figures: Figures) -> Any:
    """Density and share of the full union by number of rows, beside the paper's."""
    picture, axes = _grid(1, 2)
    paper = np.array(figures.paper_density)
    rows = range(1, paper.size + 1)
    for panel, values in zip(axes[0], (paper / 100, paper / paper[-1]), strict=True):
        panel.plot(rows, values, color="black", linewidth=2, label="paper, Figure 3")
    for curve in figures.unions:
        dashes = "-" if curve.heads == "max" else ":"
        marker = {"answer": "o", "late_key": "^"}.get(curve.kind, ".")
        label = f"{curve.kind}, {curve.context // 1024}K, b={curve.budget}, heads {curve.heads}"
        for panel, values in zip(axes[0], (curve.density, curve.of_all_rows), strict=True):
            line = {"linestyle": dashes, "marker": marker, "markersize": 3, "linewidth": 1}
            panel.plot(range(1, len(values) + 1), values, label=label, **line)
        axes[0][0].yaxis.set_major_formatter("{x:.0%}")
    _label(axes[0][0], "prefix read per KV head", "active rows", "density")
    _label(axes[0][1], "relative to all rows", "active rows", "share of the full union")
    return _finish(picture, axes[0][0], 3)


def _locality(figures: Figures) -> Any:
    """Heat maps of the change by rank and layer, with the tokens that make up half of it."""
    kinds = list(dict.fromkeys((c.kind, c.context) for c in figures.changes))
    picture, axes = _grid(len(kinds), len(WHAT))
    for line, (kind, context) in zip(axes, kinds, strict=True):
        mine = [c for c in figures.changes if (c.kind, c.context) == (kind, context)]
        for panel, what in zip(line, WHAT, strict=True):
            shares = np.array([c.by_rank[what] for c in mine]).T
            image = panel.imshow(shares, aspect="auto", cmap="viridis", vmin=0.0, origin="upper")
            panel.plot(range(len(mine)), [c.half[what] - 0.5 for c in mine], color="white", linestyle="--", marker="o")
            panel.set_xticks(range(len(mine)))
            panel.set_title(f"{kind}, {context:,}: {what}", fontsize=9)
            panel.set_xlabel("layer", fontsize=8)
            panel.set_ylabel("token by rank of change", fontsize=8)
            picture.colorbar(image, ax=panel, format="{x:.0%}")
    picture.suptitle("share of a block's change between two steps; dashed: half of it", fontsize=10)
    picture.tight_layout()
    return picture


def _places(found: Sequence[Outcome]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((o.kind, o.context) for o in found))


def _shown(found: Sequence[Outcome], kind: str, context: int) -> list[Outcome]:
    """Per name the setting nearest to the budget that is drawn; of those without a budget the middle one."""
    mine = [o for o in found if (o.kind, o.context) == (kind, context) and o.name != "dense"]
    chosen = []
    for name in dict.fromkeys(o.name for o in mine):
        some = [o for o in mine if o.name == name]
        near = [o for o in some if o.share is not None]
        chosen.append(min(near, key=lambda o: abs((o.share or 0) - ERROR_SHARE)) if near else some[len(some) // 2])
    return chosen


def _grid(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(4.2 * columns + 0.6, 3.4 * rows + 0.9), squeeze=False)


def _label(panel: Any, title: str, x: str, y: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(x, fontsize=8)
    panel.set_ylabel(y, fontsize=8)
    panel.grid(alpha=0.25)


def _finish(picture: Any, panel: Any, columns: int) -> Any:
    """One legend below all panels."""
    handles, labels = panel.get_legend_handles_labels()
    inches = 0.25 + 0.16 * -(-len(labels) // columns)
    picture.tight_layout(rect=(0, inches / picture.get_figheight(), 1, 1))
    picture.legend(handles, labels, loc="lower center", ncol=columns, frameon=False, fontsize=7)
    return picture

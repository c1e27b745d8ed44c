"""From what was played to figures: means over the scripts of a kind. Plain values that fit into JSON.

S settings, T steps, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from benchmarks.quality.probe.locality import WHAT, Changes
from benchmarks.quality.probe.play import Floats, Played
from benchmarks.quality.probe.union import PAPER, Unions
from benchmarks.quality.settings import Setting


class Outcome(BaseModel):
    """One setting on one kind of script.

    perplexity: of the scored tokens, each given what stood in the block at the step that revealed it; right: the share
    of them that was the likeliest token. bytes_ratio: of the later steps relative to dense, block_bytes_ratio: of all.
    prefix_error, output_error: relative L2 error of the attention to the prefix, and to prefix and block, per step and
    layer; steps that fewer than half of the scripts have are left out.
    """

    model_config = ConfigDict(frozen=True)
    kind: str
    context: int
    name: str
    method: str
    budget: int | None
    share: float | None
    options: dict[str, bool | int | float | str]
    tokens: int
    perplexity: float
    right: float
    bytes_ratio: float
    block_bytes_ratio: float
    prefix_error: list[list[float]]
    output_error: list[list[float]]


class UnionCurve(BaseModel):
    """Density per KV head by number of rows that choose, 1 to B."""

    model_config = ConfigDict(frozen=True)
    kind: str
    context: int
    budget: int
    share_of_context: float
    heads: str
    density: list[float]
    of_all_rows: list[float]


class LayerChange(BaseModel):
    """How concentrated the changes of a layer are. by_rank: share of the block's change, largest token first; half:
    tokens that make up half of it, by what is looked at. overlap: share of the tokens just revealed among the `active`
    whose query changed most; by_chance: the same if they were drawn."""

    model_config = ConfigDict(frozen=True)
    kind: str
    context: int
    layer: int
    by_rank: dict[str, list[float]]
    half: dict[str, float]
    active: int
    overlap: float
    by_chance: float


class Figures(BaseModel):
    """Everything a run of the probe found."""

    outcomes: list[Outcome] = []
    unions: list[UnionCurve] = []
    changes: list[LayerChange] = []
    paper_density: list[float] = list(PAPER)
    scripts: dict[str, int] = {}
    commit: str = ""
    versions: dict[str, str] = {}


def outcomes(played: Sequence[Played], settings: Sequence[Setting], kind: str, context: int) -> list[Outcome]:
    """One per setting."""
    mine = [p for p in played if p.kind == kind]
    steps = _common_steps(mine)
    found = []
    for s, setting in enumerate(settings):
        logprobs = np.concatenate([p.logprobs[s] for p in mine])
        later = [p.read[s, 1:].sum() / p.dense[s, 1:].sum() for p in mine if p.dense.shape[1] > 1]
        found.append(
            Outcome(
                kind=kind,
                context=context,
                name=setting.name,
                method=setting.method,
                budget=setting.budget,
                share=setting.share,
                options=dict(setting.options),
                tokens=logprobs.size,
                perplexity=math.exp(-logprobs.mean()),
                right=float(np.concatenate([p.right[s] for p in mine]).mean()),
                bytes_ratio=float(np.mean(later)),
                block_bytes_ratio=float(np.mean([p.read[s].sum() / p.dense[s].sum() for p in mine])),
                prefix_error=_mean([p.prefix_error[s] for p in mine], steps),
                output_error=_mean([p.output_error[s] for p in mine], steps),
            )
        )
    return found


def union_curves(unions: Unions, kind: str, context: int) -> list[UnionCurve]:
    """One per choice."""
    found = []
    for choice in unions.densities:
        curve = unions.curve(choice)
        found.append(
            UnionCurve(
                kind=kind,
                context=context,
                budget=choice.tokens,
                share_of_context=choice.tokens / context,
                heads=choice.share,
                density=curve.tolist(),
                of_all_rows=(curve / curve[-1]).tolist(),
            )
        )
    return found


def layer_changes(changes: Changes, kind: str, context: int, layers: int, active: int) -> list[LayerChange]:
    """One per layer."""
    block = changes.moved[0].query.shape[0]
    return [
        LayerChange(
            kind=kind,
            context=context,
            layer=layer,
            by_rank={what: changes.shares(what, layer).tolist() for what in WHAT},
            half={what: changes.tokens_for_half(what, layer) for what in WHAT},
            active=active,
            overlap=changes.overlap(layer, active),
            by_chance=active / block,
        )
        for layer in range(layers)
    ]


def _common_steps(played: Sequence[Played]) -> int:
    """Steps that at least half of the scripts have."""
    counts = sorted(p.read.shape[1] for p in played)
    return counts[len(counts) // 2]


def _mean(errors: Sequence[Floats], steps: int) -> list[list[float]]:
    """[T, L] over the scripts that have the step."""
    return [np.mean([e[step] for e in errors if e.shape[0] > step], axis=0).tolist() for step in range(steps)]

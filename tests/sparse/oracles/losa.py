"""LoSA: dense first, then the most changed rows over the union of their pages; the others keep what they have.

And what its options make of that.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from losa_runtime.core.batch import ActiveRule
from tests.sparse.oracles.bounds import listed_positions
from tests.sparse.oracles.maths import Scene, States, best

Pairs = set[tuple[int, int]]  # (row, query head)


def prefix_states(scene: Scene) -> States:
    """The remembered states after this step."""
    options: Any = scene.sparse.options
    if scene.layer < options.dense_layers:
        return scene.dense()
    every = {(row, head) for row in scene.rows for head in scene.heads}
    again = scene.step > 0 and options.refresh_every > 0 and scene.step % options.refresh_every == 0
    active = every if scene.step == 0 or again else _active(scene, options.granularity)
    states = {} if scene.step == 0 else dict(scene.memory["states"])
    if again or (scene.step == 0 and options.first_step == "dense"):
        states = scene.dense()
    else:
        lists: Any = {}
        if len(scene.keys) > scene.sparse.token_budget:
            lists = listed_positions(scene, active, options.share, options.pages)
        states |= {(row, head): scene.attend(row, head, lists.get((row, head))) for row, head in active}
    _remember_queries(scene, active, every if options.reference == "step" else active)
    scene.memory["states"] = states
    return states


def _active(scene: Scene, granularity: str) -> Pairs:
    """The most changed rows, for all heads at once or for each head by itself."""
    parts = [[head] for head in scene.heads] if granularity == "head" else [list(scene.heads)]
    active: Pairs = set()
    for heads in parts:
        change = [sum(_distance(scene, row, head) for head in heads) for row in scene.rows]
        active |= {(row, head) for row in most_changed(change, scene.sparse.active) for head in heads}
    return active


def _distance(scene: Scene, row: int, head: int) -> float:
    before: Tensor = scene.memory["before"][row, head]
    return float(((scene.q[row, head] - before) ** 2).sum())


def most_changed(change: list[float], rule: ActiveRule) -> set[int]:
    """Rows by a count, a share of the rows rounded up, or the fewest that hold the share tau of the whole change."""
    if rule.kind != "tau":
        return best(change, int(rule.value) if rule.kind == "count" else math.ceil(rule.value * len(change)))
    rows, held = set(), 0.0
    for row in sorted(range(len(change)), key=lambda i: (-change[i], i)):
        if held >= rule.value * sum(change):
            break
        rows.add(row)
        held += change[row]
    return rows


def _remember_queries(scene: Scene, active: Pairs, replaced: Pairs) -> None:
    before = scene.memory.setdefault("before", {})
    before |= {(row, head): scene.q[row, head] for row, head in replaced | active}

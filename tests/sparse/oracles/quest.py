"""QUEST adapted to blocks: all rows, each step, the union of their pages; and what its options make of that."""

from __future__ import annotations

from typing import Any

from tests.sparse.oracles.bounds import listed_positions
from tests.sparse.oracles.maths import Scene, States


def prefix_states(scene: Scene) -> States:
    """Every row over the union of the rows' pages."""
    options: Any = scene.sparse.options
    opening = scene.step == 0 and options.first_step == "dense"
    if opening or scene.layer < options.dense_layers or len(scene.keys) <= scene.sparse.token_budget:
        return scene.dense()
    every = {(row, head) for row in scene.rows for head in scene.heads}
    lists = listed_positions(scene, every, options.share, options.pages)
    return {(row, head): scene.attend(row, head, lists[row, head]) for row, head in every}

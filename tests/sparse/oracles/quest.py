"""QUEST adapted to blocks: all rows, each step, the union of their pages."""

from __future__ import annotations

from tests.sparse.oracles.bounds import chosen_positions
from tests.sparse.oracles.maths import Scene, States


def prefix_states(scene: Scene) -> States:
    """Every row over the union of the rows' pages."""
    if len(scene.keys) <= scene.sparse.token_budget:
        return scene.dense()
    listed = {g: chosen_positions(scene, list(scene.rows), g) for g in range(scene.keys.shape[1])}
    return {(r, h): scene.attend(r, h, listed[scene.kv_head(h)]) for r in scene.rows for h in scene.heads}

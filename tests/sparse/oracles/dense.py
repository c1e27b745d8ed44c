"""Everything, always."""

from __future__ import annotations

from tests.sparse.oracles.maths import Scene, States


def prefix_states(scene: Scene) -> States:
    """Every row over the whole prefix."""
    return scene.dense()

"""FlashBlock: the block's states as they were at the last refresh, or dense ones."""

from __future__ import annotations

from tests.sparse.oracles.maths import Scene, States


def prefix_states(scene: Scene) -> States:
    """Dense in the first step and when enough tokens are new, else what is remembered."""
    limit = scene.sparse.options.refresh_tokens  # type: ignore[attr-defined]
    if scene.step == 0 or scene.unmasked - scene.memory["unmasked"] >= limit:
        scene.memory.update(states=scene.dense(), unmasked=scene.unmasked)
    states: States = scene.memory["states"]
    return states

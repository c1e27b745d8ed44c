"""LoSA: dense first, then the most changed rows over the union of their pages; the others keep what they have."""

from __future__ import annotations

from tests.sparse.oracles.bounds import chosen_positions
from tests.sparse.oracles.maths import Scene, States, best


def prefix_states(scene: Scene) -> States:
    """The remembered states after this step."""
    if scene.step == 0:
        states = scene.dense()
    else:
        change = [float(((scene.q[row] - scene.memory["before"][row]) ** 2).mean()) for row in scene.rows]
        active = sorted(best(change, int(scene.sparse.active.value)))
        states = dict(scene.memory["states"])
        for g in range(scene.keys.shape[1]):
            listed = None
            if len(scene.keys) > scene.sparse.token_budget:
                listed = chosen_positions(scene, active, g)
            states |= {(r, h): scene.attend(r, h, listed) for r in active for h in scene.group(g)}
    scene.memory.update(before=scene.q, states=states)
    return states

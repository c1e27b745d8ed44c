"""MAGE: dense first, which fixes the keys of the block; and the layer budgets of its first version."""

from __future__ import annotations

import math

from tests.sparse.oracles.mass import average, masses
from tests.sparse.oracles.maths import Scene, States, best


def prefix_states(scene: Scene) -> States:
    """Step 0 over everything, every later one over the keys that held most of the mass in step 0."""
    if len(scene.keys) <= scene.sparse.token_budget:
        return scene.dense()
    if scene.step == 0:
        scene.memory["held"] = {g: held(scene, g) for g in range(scene.keys.shape[1])}
        return scene.dense()
    sets = scene.memory["held"]
    return {(r, h): scene.attend(r, h, sets[scene.kv_head(h)]) for r in scene.rows for h in scene.heads}


def held(scene: Scene, kv_head: int) -> list[int]:
    """The keys with the largest mean mass over the rows and the heads of the group."""
    alpha = average([masses(scene, row, head) for row in scene.rows for head in scene.group(kv_head)])
    return sorted(best(alpha, scene.sparse.token_budget))


def adaptive_sets(layers: list[Scene], minimum: int) -> list[list[list[int]]]:
    """Algorithm 1 of the first version over the first step of all layers: the keys per layer and KV head."""
    wanted = layers[0].sparse.token_budget
    ballots = [[_ballot(scene, g, wanted) for g in range(scene.keys.shape[1])] for scene in layers]
    scores = [max(score for _, score in layer) for layer in ballots]
    sets = []
    for scene, layer, score in zip(layers, ballots, scores, strict=True):
        count = max(minimum, math.floor(score / sum(scores) * wanted * len(layers)))
        sets.append([_final(ranked, count, len(scene.keys)) for ranked, _ in layer])
    return sets


def _ballot(scene: Scene, kv_head: int, wanted: int) -> tuple[list[int], float]:
    """The union, first the keys with most votes (then most mass), and |U| (1 - log p)."""
    voters = [masses(scene, row, head) for row in scene.rows for head in scene.group(kv_head)]
    choices = [best(shares, wanted) for shares in voters]
    union = set().union(*choices)
    covered = sum(sum(shares[key] for key in union) for shares in voters) / len(voters)
    mean = average(voters)
    votes = {key: sum(key in choice for choice in choices) for key in union}
    ranked = sorted(union, key=lambda key: (-votes[key], -mean[key], key))
    return ranked, len(union) * (1 - math.log(covered))


def _final(ranked: list[int], count: int, length: int) -> list[int]:
    chosen = ranked[:count]
    for key in range(length - 1, -1, -1):
        if len(chosen) < count and key not in chosen:
            chosen.append(key)
    return sorted(chosen)

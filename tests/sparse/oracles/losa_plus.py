"""LoSA plus: dense first; then the moved rows over the tokens of the first step that weighed most, and a remainder.

Written for prefixes of which every page is a candidate.
"""

from __future__ import annotations

import math

import torch

from tests.sparse.oracles.bounds import listed_positions
from tests.sparse.oracles.maths import Scene, States, best, softmax

TOLERANCE, LEAST_MASS, NOVELTY = 0.05, 0.001, 1.0  # the defaults


def prefix_states(scene: Scene) -> States:
    """The remembered states after this step."""
    memory, covered = scene.memory, len(scene.keys) <= scene.sparse.token_budget
    if scene.step == 0:
        states = scene.dense()
        memory.update(refreshed=scene.q.clone(), opened=scene.q.clone(), dense=states)
        memory["support"] = [] if covered else [support(scene, g) for g in range(scene.keys.shape[1])]
        memory.update(searched=scene.q.clone(), first_support=list(memory["support"]))
    else:
        states = dict(memory["states"])
        active = [row for row in scene.rows if moved(scene, row, "refreshed") > TOLERANCE]
        looking = [row for row in active if moved(scene, row, "searched") > NOVELTY and not covered]
        found = listed_positions(scene, {(row, head) for row in looking for head in scene.heads}, "max", "union")
        for (_, head), listed in found.items():
            kv_head = scene.kv_head(head)
            memory["support"][kv_head] = sorted({*memory["support"][kv_head], *listed})
        for row in active:
            memory["refreshed"][row] = scene.q[row]
            states |= {(row, h): scene.attend(row, h) if covered else fresh(scene, row, h) for h in scene.heads}
        for row in looking:
            memory["searched"][row] = scene.q[row]
    memory["states"] = states
    return states


def moved(scene: Scene, row: int, since: str) -> float:
    """Distance from a remembered query, relative to its length."""
    before = scene.memory[since][row]
    return float((scene.q[row] - before).norm() / before.norm())


def support(scene: Scene, kv_head: int) -> list[int]:
    """Positions with the largest softmax mass that any row and head of the group gives them."""
    masses = []
    for at, key in enumerate(scene.keys[:, kv_head]):
        logits = [
            (r, h, float(key @ scene.q[r, h]) / math.sqrt(len(key))) for r in scene.rows for h in scene.group(kv_head)
        ]
        masses.append(max(math.exp(x - scene.memory["dense"][r, h][1]) for r, h, x in logits))
        assert at + 1 == len(masses)
    chosen = best(masses, scene.sparse.token_budget)
    return sorted(at for at in chosen if masses[at] > LEAST_MASS)


def fresh(scene: Scene, row: int, head: int) -> tuple[torch.Tensor, float]:
    """The support now, and the rest as it was, its weight moved along the mean of its keys."""
    kv_head = scene.kv_head(head)
    inside = scene.memory["support"][kv_head]
    outside = [at for at in range(len(scene.keys)) if at not in scene.memory["first_support"][kv_head]]
    out, lse = scene.attend(row, head, inside)
    before, keys = scene.memory["opened"][row, head], scene.keys[outside, kv_head]
    if not outside:
        return out, lse
    rest, rest_lse = softmax(before, keys, scene.values[outside, kv_head])
    mean_key, _ = softmax(before, keys, keys)
    moved = rest_lse + float((scene.q[row, head] - before) @ mean_key) / math.sqrt(len(before))
    total = math.log(math.exp(lse) + math.exp(moved))
    return math.exp(lse - total) * out + math.exp(moved - total) * rest, total

"""Sparse-dLLM: dense first steps, then the tokens that the mean query liked best in the last of them."""

from __future__ import annotations

import math

from tests.sparse.oracles.maths import Scene, States, best


def prefix_states(scene: Scene) -> States:
    """Dense while the update is delayed; then over one set of tokens for all heads."""
    length, ratio = len(scene.keys), scene.sparse.options.keep_ratio  # type: ignore[attr-defined]
    count = scene.sparse.token_budget if ratio is None else math.ceil(ratio * length)
    if count >= length:
        return scene.dense()
    delay = scene.sparse.options.delay  # type: ignore[attr-defined]
    if scene.step == delay:
        scene.memory["held"] = held(scene, count)
    if scene.step <= delay:
        return scene.dense()
    return {(r, h): scene.attend(r, h, scene.memory["held"]) for r in scene.rows for h in scene.heads}


def held(scene: Scene, count: int) -> list[int]:
    """The tokens whose neighbourhood holds the best score, a mean over heads."""
    reach = scene.sparse.options.kernel // 2  # type: ignore[attr-defined]
    scores = []
    for key in range(len(scene.keys)):
        products = [float(scene.q[:, head].mean(0) @ scene.keys[key, scene.kv_head(head)]) for head in scene.heads]
        scores.append(sum(products) / len(products))
    pooled = [max(scores[max(0, at - reach) : at + reach + 1]) for at in range(len(scores))]
    return sorted(best(pooled, count))

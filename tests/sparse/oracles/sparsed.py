"""SparseD: some dense steps, the last of which fixes the key blocks of each query head."""

from __future__ import annotations

import math

from losa_runtime.core.batch import SparseParams
from tests.sparse.oracles.mass import average, masses
from tests.sparse.oracles.maths import Scene, States, best


def prefix_states(scene: Scene) -> States:
    """Dense while the share of the steps lasts; then over the key blocks of each head."""
    size, ratio, share = (_option(scene.sparse, name) for name in ("block_size", "keep_ratio", "dense_share"))
    size, dense = int(size), max(1, math.ceil(share * scene.sparse.planned_steps))
    blocks = range(math.ceil(len(scene.keys) / size))
    count = math.ceil(scene.sparse.token_budget / size) if ratio < 0 else int(len(blocks) * ratio) + 1
    if count >= len(blocks):
        return scene.dense()
    if scene.step == dense - 1:
        scene.memory["held"] = {head: _best_blocks(scene, head, size, count) for head in scene.heads}
    if scene.step < dense:
        return scene.dense()
    sets = {
        head: [key for key in range(len(scene.keys)) if key // size in chosen]
        for head, chosen in scene.memory["held"].items()
    }
    return {(row, head): scene.attend(row, head, sets[head]) for row in scene.rows for head in scene.heads}


def _best_blocks(scene: Scene, head: int, size: int, count: int) -> set[int]:
    shares = average([masses(scene, row, head) for row in scene.rows])
    return best([sum(shares[at : at + size]) / size for at in range(0, len(shares), size)], count)


def _option(sparse: SparseParams, name: str) -> float:
    found = getattr(sparse.options, name)
    return -1.0 if found is None else float(found)

"""QUEST's page bounds, one channel at a time."""

from __future__ import annotations

from torch import Tensor

from tests.sparse.oracles.maths import Scene, best


def chosen_positions(scene: Scene, rows: list[int], kv_head: int) -> list[int]:
    """Union over rows of the positions in the pages with the best bounds; a KV group shares its largest bound."""
    keys = scene.keys[:, kv_head]
    pages = [keys[at : at + scene.page] for at in range(0, len(keys), scene.page)]
    count = scene.sparse.token_budget // scene.page
    chosen: set[int] = set()
    for row in rows:
        bounds = [max(bound(scene.q[row, head], page) for head in scene.group(kv_head)) for page in pages]
        chosen |= best(bounds, count)
    return [at for at in range(len(keys)) if at // scene.page in chosen]


def bound(query: Tensor, keys: Tensor) -> float:
    """Upper bound of q . k over the keys of a page."""
    top, bottom = keys.amax(0), keys.amin(0)
    return sum(max(float(c * t), float(c * b)) for c, t, b in zip(query, top, bottom, strict=True))

"""QUEST's page bounds, one channel at a time, and what each row and head reads by them."""

from __future__ import annotations

from torch import Tensor

from tests.sparse.oracles.maths import Scene, best

Lists = dict[tuple[int, int], list[int]]  # (row, query head) -> prefix positions


def listed_positions(scene: Scene, active: set[tuple[int, int]], share: str, pages: str) -> Lists:
    """What each active (row, query head) reads; share and pages as the methods' options of that name."""
    count, own = scene.sparse.token_budget // scene.page, {}
    for row, head in active:
        voters = tuple(mate for mate in _partners(scene, head, share) if (row, mate) in active)
        if (row, voters) not in own:
            own[row, voters] = best(_shared(scene, row, voters, share), count)
    lists: Lists = {}
    for row, head in active:
        partners, chosen = _partners(scene, head, share), set()
        for (other, voters), found in own.items():
            if voters[0] in partners and (pages == "union" or other == row):
                chosen |= found
        lists[row, head] = [at for at in range(len(scene.keys)) if at // scene.page in chosen]
    return lists


def _partners(scene: Scene, head: int, share: str) -> list[int]:
    """The query heads that share a list with this one."""
    return [head] if share == "none" else scene.group(scene.kv_head(head))


def _shared(scene: Scene, row: int, voters: tuple[int, ...], share: str) -> list[float]:
    """One score per page from those of some query heads of a row."""
    scores = []
    for at in range(0, len(scene.keys), scene.page):
        found = [bound(scene.q[row, head], scene.keys[at : at + scene.page, scene.kv_head(head)]) for head in voters]
        scores.append(sum(found) / len(found) if share == "mean" else max(found))
    return scores


def bound(query: Tensor, keys: Tensor) -> float:
    """Upper bound of q . k over the keys of a page."""
    top, bottom = keys.amax(0), keys.amin(0)
    return sum(max(float(c * t), float(c * b)) for c, t, b in zip(query, top, bottom, strict=True))

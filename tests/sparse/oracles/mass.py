"""Softmax mass of the prefix keys, one query at a time."""

from __future__ import annotations

from tests.sparse.oracles.maths import Scene


def masses(scene: Scene, row: int, head: int) -> list[float]:
    """Share of each prefix key in the prefix attention of one row and query head; they sum to one."""
    keys = scene.keys[:, scene.kv_head(head)]
    scores = keys @ scene.q[row, head] / len(scene.q[row, head]) ** 0.5
    return [float(share) for share in scores.exp() / scores.exp().sum()]


def average(lists: list[list[float]]) -> list[float]:
    """Mean per key."""
    return [sum(column) / len(lists) for column in zip(*lists, strict=True)]

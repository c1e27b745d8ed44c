"""The curriculum: a ladder of document lengths and fact loads.

Each stage keeps the earlier ones in its mixture, and from the middle on the questions are put at a random distance
behind the document, so that short documents also train far-away positions.
"""

from __future__ import annotations

import random

from benchmarks.tiny_model.batches import Recipe

FIRST = {"multi_key": 0.6, "variable": 0.4}
ALL = {"multi_key": 0.4, "multi_query": 0.2, "multi_value": 0.15, "variable": 0.25}


def stages(schedule: str) -> list[Recipe]:
    """The stages in order."""
    if schedule != "main":
        raise ValueError(f"unknown schedule {schedule!r}")
    return [
        Recipe(256, 4, 12, (4, 14), FIRST),
        Recipe(256, 4, 12, (4, 14), ALL, gap=64),
        Recipe(512, 2, 16, (6, 28), ALL, gap=256),
        Recipe(1024, 1, 24, (12, 60), ALL, gap=1000),
        Recipe(2048, 1, 24, (20, 110), ALL, gap=1800),
        Recipe(4096, 1, 24, (30, 220), ALL, gap=1700),
    ]


def stage_recipe(rng: random.Random, table: list[Recipe], stage: int) -> Recipe:
    """The current stage mostly, an earlier one now and then."""
    if stage and rng.random() < 0.25:
        return table[rng.randrange(max(0, stage - 3), stage)]
    return table[stage]

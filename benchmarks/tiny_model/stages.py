"""The curriculum: a ladder of document lengths and fact loads.

Each stage keeps the earlier ones in its mixture, and from the middle on the questions are put at a random distance
behind the document, so that short documents also train far-away positions.
"""

from __future__ import annotations

import random

from benchmarks.tiny_model.batches import Recipe

FIRST = {"multi_key": 0.6, "variable": 0.4}
ALL = {"multi_key": 0.2, "multi_query": 0.2, "multi_value": 0.3, "variable": 0.3}

LAST = (0.35, 0.3, 0.22, 0.13)  # share of 512, 1024, 2048 and 4096 tokens in the end


def stages(schedule: str) -> list[Recipe]:
    """The stages in order."""
    if schedule != "main":
        raise ValueError(f"unknown schedule {schedule!r}")
    return [
        Recipe(256, 4, 12, (4, 14), FIRST),
        Recipe(512, 2, 16, (6, 28), ALL, gap=256),
        Recipe(1024, 1, 24, (12, 60), ALL, gap=1000),
        Recipe(2048, 1, 20, (20, 110), ALL, gap=1800),
        Recipe(4096, 1, 20, (30, 220), ALL, gap=1700),
    ]


def stage_recipe(rng: random.Random, table: list[Recipe], stage: int) -> Recipe:
    """The current stage mostly, an earlier one now and then; in the last stage all but the first, short ones more."""
    if stage == len(table) - 1:
        return table[rng.choices(range(1, stage + 1), LAST[-stage:])[0]]
    if stage and rng.random() < 0.25:
        return table[rng.randrange(max(0, stage - 3), stage)]
    return table[stage]

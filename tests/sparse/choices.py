"""Choices of options that the contract suite runs beside the defaults: every alternative alone, and some together.

LoSA and QUEST: their tables of cases follow from the options, so the combinations may be drawn.
"""

from __future__ import annotations

import random
from typing import Any

from losa_runtime.core.batch import SparseParams
from tests.sparse import cases, stage
from tests.sparse.cases import ALL, Case

PAGES: dict[str, list[Any]] = {"share": ["mean", "none"], "pages": ["own"], "dense_layers": [1]}
QUEST = PAGES | {"first_step": ["dense"]}
LOSA = PAGES | {
    "granularity": ["head"],
    "reference": ["refresh"],
    "first_step": ["sparse"],
    "refresh_every": [2],
}
DRAWN = 5  # combinations of each method


def _quest(options: dict[str, Any]) -> Case:
    """What to expect: the reports of both methods, where they are the same in all layers and steps."""
    first = "nothing" if options.get("first_step") == "dense" else "summaries"
    partly = bool(options.get("dense_layers"))
    return Case(
        keeps_state=False,
        opens_dense=first == "nothing",
        active=ALL,
        first=None if partly and first == "summaries" else first,
        later=None if partly else "summaries",
        alike=options.get("pages") != "own" and options.get("share") != "none",
        options=options,
    )


def _losa(options: dict[str, Any]) -> Case:
    expected = _quest({"first_step": "dense"} | options)
    varies = any(options.get(name) for name in ("dense_layers", "refresh_every"))
    by_head = options.get("granularity") == "head"
    return expected._replace(
        keeps_state=True,
        active=None if varies or by_head else 3,
        later=None if varies else expected.later,
        alike=expected.alike and not by_head,
        options=options,
    )


def _combinations(table: dict[str, list[Any]], seed: int) -> list[dict[str, Any]]:
    """Each alternative by itself, then drawn ones: each option at its default or at an alternative."""
    draw = random.Random(seed)
    alone = [{name: value} for name, values in table.items() for value in values]
    drawn = [{name: draw.choice([None, *values]) for name, values in table.items()} for _ in range(DRAWN)]
    return alone + [{name: value for name, value in some.items() if value is not None} for some in drawn]


def _named(method: str, choices: list[Case]) -> dict[str, Case]:
    return {f"{method}/{','.join(f'{k}={v}' for k, v in case.options.items())}": case for case in choices}


CHOICES = _named("quest", [_quest(options) for options in _combinations(QUEST, 0)])
CHOICES |= _named("losa", [_losa(options) for options in _combinations(LOSA, 1)])
# A float32 vector and its variance per page are two vectors, as the bounds are; by position 5 key blocks of 16 each.
CHOICES |= _named(
    "ba_att",
    [
        Case(
            options={"block_size": 16, "sort": False},
            opens_dense=False,
            active=ALL,
            first="summaries",
            later=2 * 5,
        )
    ],
)
CASES = cases.CASES | CHOICES


def usual(name: str, budget: int = 16, active: float = 3, kind: str = "count", **options: Any) -> SparseParams:
    """The suite's parameters of a method or a choice (method/choice); options: further ones."""
    return stage.params(name.partition("/")[0], budget, active, kind, **CASES[name].options | options)

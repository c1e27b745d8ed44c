"""What the rows say about the claims made for the methods: each holds, does not hold, or is not decided.

Accuracies are means over all tasks and contexts; intervals and tests draw documents (see `statistics`). Points are
hundredths of accuracy. Knows no engine and prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict

from benchmarks.quality.pools import DENSE, Pool, Strength, difference, difference_of_rows, named, pools
from benchmarks.quality.rows import Row
from benchmarks.quality.samples import LATE_KEY
from benchmarks.quality.settings import QUEST_DENSE_FIRST
from benchmarks.quality.statistics import Difference, holm

Verdict = Literal["holds", "does not hold", "not decided"]
Figure = dict[str, str | float | bool | None]
Bytes = Callable[[Row], float | None]

NEAR = 0.02  # within which LoSA is to stay of dense
LOSS = 0.05  # that QUEST has where the claim is looked at
CLOSE = 0.01  # to dense, for the bytes that are needed
RATIO = 1.4  # QUEST's density to LoSA's
LARGEST_SHARE = 0.12  # of the context; LoSA's paper measures budgets up to about a tenth of its prompts
LEVEL = 0.05  # of the tests, after Holm's correction

BYTES: dict[str, Bytes] = {
    "later steps": lambda row: row.bytes_ratio,
    "whole blocks": lambda row: row.block_bytes_ratio,
}


class Claim(BaseModel):
    """A statement, what became of it, and the figures it rests on."""

    model_config = ConfigDict(frozen=True)
    name: str
    statement: str
    verdict: Verdict
    because: str
    figures: list[Figure]


def judge(rows: Sequence[Row]) -> list[Claim]:
    """Every claim, in the light of these rows: of the questions, then of the late keys, whose blocks differ in kind."""
    questions, late = [row for row in rows if row.task != LATE_KEY], [row for row in rows if row.task == LATE_KEY]
    found = _claims(questions) if questions else []
    for claim in _claims(late) if late else []:
        changed = {"name": f"{claim.name}_{LATE_KEY}", "statement": f"late keys: {claim.statement}"}
        found.append(claim.model_copy(update=changed))
    return found


def _claims(rows: Sequence[Row]) -> list[Claim]:
    return [
        near_dense(rows),
        *density(rows),
        dense_first_step(rows),
        *(not_worse(rows, kind) for kind in BYTES),
        *(fewer_bytes(rows, kind) for kind in BYTES),
    ]


def near_dense(rows: Sequence[Row]) -> Claim:
    """LoSA against dense where QUEST loses; the verdict is that over all tasks, at the largest such budget."""
    scopes = {"all": list(rows)} | {
        task: [r for r in rows if r.task == task] for task in sorted({r.task for r in rows})
    }
    found = [(scope, *losses) for scope, mine in scopes.items() for losses in _losses(pools(mine))]
    figures: list[Figure] = [
        {"tasks": scope, "budget": level.label, **_points("quest_loss", quest), **_points("losa_loss", losa)}
        for scope, level, quest, losa in found
    ]
    verdict: Verdict = "not decided"
    because = f"QUEST loses {LOSS * 100:g} points at no budget"
    for level, losa in ((level, losa) for scope, level, quest, losa in found if scope == "all" and -quest.mean >= LOSS):
        verdict = "holds" if -losa.low <= NEAR else "does not hold" if -losa.high > NEAR else "not decided"
        because = f"at budget {level.label} LoSA loses {_interval(losa, -1)} points"
    statement = (
        f"LoSA stays within {NEAR * 100:g} points of dense at the budget where QUEST loses {LOSS * 100:g} or more"
    )
    return Claim(name="near_dense", statement=statement, verdict=verdict, because=because, figures=figures)


def density(rows: Sequence[Row]) -> list[Claim]:
    """QUEST's density per KV head relative to LoSA's, by budget; both are counted, not drawn."""
    both = list(_both(pools(rows), "quest", "losa"))
    ratios: list[tuple[Strength, float]] = []
    figures: list[Figure] = []
    for level, quest, losa in both:
        a, b = quest.mean(lambda row: row.density_kv), losa.mean(lambda row: row.density_kv)
        if a and b:
            ratios.append((level, a / b))
            figures.append({"budget": level.label, "quest": a, "losa": b, "ratio": a / b})
    shown = ", ".join(f"{level.label}: {ratio:.2f}" for level, ratio in ratios)
    asked = [ratio for level, ratio in ratios if level.order <= LARGEST_SHARE]
    large: Verdict = "not decided" if not asked else "holds" if min(asked) >= RATIO else "does not hold"
    falls = all(a > b for (_, a), (_, b) in pairwise(ratios))
    falling: Verdict = "not decided" if len(ratios) < 2 else "holds" if falls else "does not hold"
    statement = f"QUEST reads at least {RATIO} times LoSA's density at budgets up to {LARGEST_SHARE:.0%} of the context"
    return [
        Claim(name="density_ratio", statement=statement, verdict=large, because=shown, figures=figures),
        Claim(
            name="density_ratio_falls",
            statement="the ratio of the densities falls as the budget grows",
            verdict=falling,
            because=shown,
            figures=figures,
        ),
    ]


def dense_first_step(rows: Sequence[Row]) -> Claim:
    """The same reading in later steps behind a dense and a sparse first step."""
    found = [
        (level, difference(dense, sparse)) for level, dense, sparse in _both(pools(rows), QUEST_DENSE_FIRST, "quest")
    ]
    known = [(level, mine) for level, mine in found if mine is not None]
    adjusted = holm([mine.p for _, mine in known])
    figures: list[Figure] = [
        {"budget": level.label, **_points("gain", mine), "p": p}
        for (level, mine), p in zip(known, adjusted, strict=True)
    ]
    better = [level.label for (level, mine), p in zip(known, adjusted, strict=True) if p < LEVEL and mine.mean > 0]
    worse = [level.label for (level, mine), p in zip(known, adjusted, strict=True) if p < LEVEL and mine.mean < 0]
    verdict: Verdict = "does not hold" if worse else "holds" if better else "not decided"
    because = f"better at {', '.join(better) or 'no budget'}, worse at {', '.join(worse) or 'no budget'}"
    statement = "QUEST is better behind a dense first step than behind a sparse one"
    return Claim(name="dense_first_step", statement=statement, verdict=verdict, because=because, figures=figures)


def not_worse(rows: Sequence[Row], kind: str) -> Claim:
    """LoSA plus against every other setting, at its most bytes that are not above the other's (else its fewest).

    Two families of tests, each with Holm's correction: the settings, each pooled over all tasks and contexts, and every
    single cell. It holds if none finds it worse and no pooled interval reaches below the points by which LoSA may
    differ from dense, so that few samples decide nothing.
    """
    plus = [row for row in rows if row.name == "losa_plus"]
    others = [pool for pool in pools(rows) if pool.name != "losa_plus"]
    figures: list[Figure] = []
    pooled: list[tuple[str, Difference]] = []
    cells: list[tuple[str, Difference]] = []
    for pool in others:
        pairs = [(mine, row) for row in pool.rows.values() if (mine := _match(plus, row, BYTES[kind]))]
        together = difference_of_rows(pairs)
        if together is None:
            continue
        pooled.append((pool.label, together))
        above = sum((BYTES[kind](mine) or 0.0) > (BYTES[kind](row) or 0.0) for mine, row in pairs)
        figures.append({"against": pool.label, **_points("gain", together), "cells": len(pairs), "above": above})
        for pair in pairs:
            alone = difference_of_rows([pair])
            assert alone is not None
            cells.append((f"{pool.label} ({pair[1].task}, {pair[1].context})", alone))
    for figure, p, p_worse in zip(figures, *_adjusted(pooled), strict=True):
        figure |= {"p": p, "p_worse": p_worse}
    worse = [label for label, p in _significant(pooled) + _significant(cells)]
    better = sum(p < LEVEL and mine.mean > 0 for (_, mine), p in zip(pooled, _adjusted(pooled)[0], strict=True))
    sure = bool(pooled) and all(mine.low >= -NEAR for _, mine in pooled)
    verdict: Verdict = "does not hold" if worse else "holds" if sure else "not decided"
    because = (
        f"significantly worse than {', '.join(worse) or 'no setting'} ({len(pooled)} pooled comparisons, "
        f"{len(cells)} of cells), significantly better than {better} settings (pooled)"
    )
    statement = f"LoSA plus is not significantly worse than any other setting at equal bytes ({kind})"
    name = f"losa_plus_not_worse_{kind.replace(' ', '_')}"
    return Claim(name=name, statement=statement, verdict=verdict, because=because, figures=figures)


def fewer_bytes(rows: Sequence[Row], kind: str) -> Claim:
    """The fewest bytes of each method with which it comes within a point of dense, over all contexts and at each."""
    scopes = {"all": list(rows)} | {
        str(n): [r for r in rows if r.context == n] for n in sorted({r.context for r in rows})
    }
    figures: list[Figure] = []
    for scope, mine in scopes.items():
        every = pools(mine)
        needed = {name: _needed(every, name, BYTES[kind]) for name in dict.fromkeys(pool.name for pool in every)}
        figures.append({"context": scope, **needed})
    first = figures[0]
    plus, losa = first.get("losa_plus"), first.get("losa")
    shown = ", ".join(f"{name}: {_share(value)}" for name, value in first.items() if name != "context")
    verdict: Verdict = "not decided"
    if {"losa", "losa_plus"} <= first.keys() and (plus is not None or losa is not None):
        fewer = isinstance(plus, float) and (losa is None or (isinstance(losa, float) and plus < losa))
        verdict = "holds" if fewer else "does not hold"
    statement = f"LoSA plus needs fewer bytes than LoSA to come within {CLOSE * 100:g} point of dense ({kind})"
    name = f"losa_plus_fewer_bytes_{kind.replace(' ', '_')}"
    return Claim(name=name, statement=statement, verdict=verdict, because=shown, figures=figures)


def _losses(every: Sequence[Pool]) -> Iterator[tuple[Strength, Difference, Difference]]:
    """Per budget, weakest first: QUEST and LoSA against dense."""
    for dense in named(every, DENSE):
        for level, quest, losa in _both(every, "quest", "losa"):
            a, b = difference(quest, dense), difference(losa, dense)
            if a is not None and b is not None:
                yield level, a, b


def _both(every: Sequence[Pool], first: str, second: str) -> Iterator[tuple[Strength, Pool, Pool]]:
    """Pools of two methods with the same strength, weakest first."""
    others = {pool.strength: pool for pool in named(every, second)}
    for pool in named(every, first):
        if pool.strength in others:
            yield pool.strength, pool, others[pool.strength]


def _match(plus: Sequence[Row], row: Row, figure: Bytes) -> Row | None:
    """Of LoSA plus in the same cell: the most bytes not above the row's, else the fewest; None if not measured."""
    limit = figure(row)
    mine = [
        (size, p) for p in plus if (p.task, p.context) == (row.task, row.context) and (size := figure(p)) is not None
    ]
    if limit is None or not mine:
        return None
    below = [entry for entry in mine if entry[0] <= limit]
    return max(below, key=lambda e: e[0])[1] if below else min(mine, key=lambda e: e[0])[1]


def _needed(every: Sequence[Pool], name: str, figure: Bytes) -> float | None:
    """Fewest bytes of a method's settings within `CLOSE` of dense; None if none is, or dense was not measured."""
    dense = named(every, DENSE)
    if not dense:
        return None
    near = [pool for pool in named(every, name) if pool.accuracy >= dense[0].accuracy - CLOSE - 1e-9]
    return min((size for pool in near if (size := pool.mean(figure)) is not None), default=None)


def _adjusted(family: Sequence[tuple[str, Difference]]) -> tuple[list[float], list[float]]:
    """Two-sided and one-sided p-values after Holm's correction."""
    return holm([mine.p for _, mine in family]), holm([mine.p_worse for _, mine in family])


def _significant(family: Sequence[tuple[str, Difference]]) -> list[tuple[str, float]]:
    """Labels with their adjusted p-values where the first is significantly worse."""
    adjusted = _adjusted(family)[1]
    return [(label, p) for (label, _), p in zip(family, adjusted, strict=True) if p < LEVEL]


def _points(name: str, mine: Difference) -> Figure:
    """A difference in points with its interval; a loss is positive where the first is worse."""
    sign = -100.0 if name.endswith("loss") else 100.0
    ends = sorted((sign * mine.low, sign * mine.high))
    return {name: sign * mine.mean + 0.0, f"{name}_low": ends[0] + 0.0, f"{name}_high": ends[1] + 0.0}


def _interval(mine: Difference, sign: int) -> str:
    low, high = sorted((sign * mine.low, sign * mine.high))
    return f"{100 * sign * mine.mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _share(value: object) -> str:
    return f"{value:.1%}" if isinstance(value, float) else "never"

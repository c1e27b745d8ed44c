"""Rows brought together over tasks and contexts: what tables, plots and claims speak of. Knows no engine.

A method's strength is its budget as a share of the context, or FlashBlock's option. Rows of one strength at different
contexts are comparable; their outcomes are pooled with the same weight for each task and context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from benchmarks.quality.rows import Row
from benchmarks.quality.statistics import Difference, Outcomes, compare

Place = tuple[str, int]  # task, context
DENSE = "dense"


class Strength(NamedTuple):
    """order: for sorting, weakest first. label: for people."""

    order: float
    label: str


def strength(row: Row) -> Strength:
    """How much a row's setting may read."""
    if row.share is not None:
        return Strength(row.share, f"{row.share:.0%}")
    tokens = row.options.get("refresh_tokens")
    return Strength(1.0, "all") if tokens is None else Strength(-float(tokens), f"refresh {tokens}")


class Pool(NamedTuple):
    """The rows of one name and strength, by place."""

    name: str
    strength: Strength
    rows: dict[Place, Row]

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.name} {self.strength.label}"

    @property
    def accuracy(self) -> float:
        """Mean over the places."""
        return fmean(row.accuracy for row in self.rows.values())

    def mean(self, figure: Callable[[Row], float | None]) -> float | None:
        """Mean of a figure over the places that have it."""
        known = [value for value in map(figure, self.rows.values()) if value is not None]
        return fmean(known) if known else None


def pools(rows: Iterable[Row]) -> list[Pool]:
    """One pool per name and strength, in the order of the rows."""
    found: dict[tuple[str, Strength], dict[Place, Row]] = {}
    for row in rows:
        level = strength(row)
        places = found.setdefault((row.name, level), {})
        place = (row.task, row.context)
        assert place not in places, f"two rows of {row.name} {level.label} at {place}"
        places[place] = row
    return [Pool(name, level, places) for (name, level), places in found.items()]


def named(all_pools: Iterable[Pool], name: str) -> list[Pool]:
    """A method's pools, weakest first."""
    return sorted((pool for pool in all_pools if pool.name == name), key=lambda pool: pool.strength.order)


def difference(a: Pool, b: Pool) -> Difference | None:
    """a against b over the places that both have; None if there are none."""
    return difference_of_rows([(a.rows[place], b.rows[place]) for place in a.rows if place in b.rows])


def difference_of_rows(pairs: Sequence[tuple[Row, Row]]) -> Difference | None:
    """The first of each pair against the second; None without pairs. Both must have been asked the same questions."""
    cells: list[tuple[Outcomes, Outcomes]] = []
    for a, b in pairs:
        assert (a.task, a.context, a.seed, a.samples) == (b.task, b.context, b.seed, b.samples), "unpaired rows"
        cells.append((a.documents, b.documents))
    return compare(cells) if cells else None

"""What a drill found: figures that should be at most something. Knows no drill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

UNITS = {"_s": " s", "_kib": " KiB"}


class Figure(NamedTuple):
    """value: seconds (names end in `_s`), KiB (`_kib`) or a count. at_most: the goal; None where there is none."""

    name: str
    value: float
    at_most: float | None = None

    @property
    def met(self) -> bool:
        """Whether the goal, if there is one, is met."""
        return self.at_most is None or self.value <= self.at_most

    @property
    def exact(self) -> bool:
        """Whether it is a count, which must hold on a machine of any speed."""
        return not self.unit

    @property
    def unit(self) -> str:
        """ " s", " KiB", or nothing for counts."""
        return next((unit for ending, unit in UNITS.items() if self.name.endswith(ending)), "")

    @property
    def title(self) -> str:
        """Its name without the ending."""
        return next((self.name.removesuffix(ending) for ending in UNITS if self.name.endswith(ending)), self.name)


def worst(runs: Sequence[Sequence[Figure]]) -> list[Figure]:
    """The largest value of each figure over several runs of one drill."""
    return [max(same, key=lambda figure: figure.value) for same in zip(*runs, strict=True)]

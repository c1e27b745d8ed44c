"""From which prefix on a sparse method pays: shorter ones are attended densely, block by block.

Choosing what to read costs about the same for any prefix, reading densely costs in proportion to it; so there is a
length from which a block is no slower than a dense one. It is either given, or computed for each request from what a
few blocks took on this machine at the start. Knows no clock and no engine. n prefix tokens, T steps of a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from losa_runtime.core.batch import SparseParams
from losa_runtime.sparse.step import most_active

NEVER = 1 << 40  # tokens: longer than any prefix
# Of a dense block's time that a sparse one must save by the model: what it was measured by is noisy, and short steps
# gain less from a second thread than its processor's seconds, which are what is measured, tell.
MARGIN = 0.06


class Line(NamedTuple):
    """Seconds of one step: base + slope * n."""

    base: float
    slope: float

    @classmethod
    def through(cls, a: tuple[int, float], b: tuple[int, float]) -> Line:
        """The line through two measurements (n, seconds). Reading more is never faster: the slope is at least 0."""
        (n, t), (m, u) = a, b
        slope = max(0.0, (u - t) / (m - n))
        return cls(max(0.0, u - slope * m), slope)


_FREE = Line(0.0, 0.0)


class MethodCosts(NamedTuple):
    """Of a block of one request. first: its first step. later: the mean of the others, with a budget of `budget`
    tokens and `rows` active rows; per_token, per_row: seconds that each further one of them adds to that. 0 for
    methods that have none."""

    first: Line
    later: Line
    budget: int = 0
    per_token: float = 0.0
    rows: int = 0
    per_row: float = 0.0


@dataclass(frozen=True)
class MinContext:
    """The rule of one engine. tokens: the given number; None = by the measured costs.

    Prefixes within the budget are attended densely in any case where it is by costs: there is nothing to choose there.
    What is measured are a method's defaults. A request's own budget and active rows count (a share of the change as all
    rows that it may be); its other options are not told apart.
    """

    tokens: int | None = 0
    block_length: int = 1
    dense: Line = _FREE
    methods: Mapping[str, MethodCosts] = field(default_factory=dict)

    def of(self, params: SparseParams, steps: int) -> int:
        """Least prefix in tokens for which these parameters are used; `NEVER` if dense attention is always faster.

        steps: of a block, the fewest that it may be done in if that is not known.
        """
        if params.method == "dense":
            return 0
        if self.tokens is not None:
            return self.tokens
        costs = self.methods[params.method]
        more = costs.per_token * (params.token_budget - costs.budget) if costs.budget else 0.0
        if costs.rows:
            more += costs.per_row * (most_active(params.active, self.block_length) - costs.rows)
        later = Line(max(0.0, costs.later.base + more), costs.later.slope)
        found = _crossing(self.dense, costs.first, later, steps)
        return max(found, params.token_budget + 1) if costs.budget else found


def _crossing(dense: Line, first: Line, later: Line, steps: int) -> int:
    """Least n at which first + (T - 1) later steps take (1 - MARGIN) of T dense ones or less."""
    allowed = steps * (1 - MARGIN)
    base = first.base + (steps - 1) * later.base - allowed * dense.base
    slope = first.slope + (steps - 1) * later.slope - allowed * dense.slope
    if slope >= 0:
        return 0 if base <= 0 and slope == 0 else NEVER
    least = base / -slope  # infinite, where the slope is next to none
    return math.ceil(min(max(0.0, least), NEVER))

"""What the contract suite has to know of each method: how to make it exact, and what it reads when."""

from __future__ import annotations

from typing import Any, NamedTuple


class Case(NamedTuple):
    """One method.

    full: options under which a full budget with all rows active is dense attention. keeps_state: whether a later step
    needs its opening step. opens_dense: whether the first steps read everything. active: rows recomputed in a later
    step when the request says 3 (None: it varies). opening: how many steps are first ones when 8 are planned. first,
    later: what is read to choose in the last of the first steps and in those behind it, "nothing", "summaries" or
    "keys" (None: it varies); in steps before these nothing is.
    """

    full: dict[str, Any] = {}  # noqa: RUF012 - never written to
    keeps_state: bool = True
    opens_dense: bool = True
    active: int | None = None
    opening: int = 1
    first: str | None = "nothing"
    later: str | None = "nothing"


ALL = -1  # every row of the block

CASES: dict[str, Case] = {
    "dense": Case(keeps_state=False, active=ALL),
    "quest": Case(keeps_state=False, opens_dense=False, active=ALL, first="summaries", later="summaries"),
    "losa": Case(active=3, later="summaries"),
    "mage": Case(active=ALL, first="keys"),
    "sparsed": Case(active=ALL, opening=2, first="keys"),
}

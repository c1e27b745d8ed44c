"""What the contract suite has to know of each method: how to make it exact, and what it reads when."""

from __future__ import annotations

from typing import Any, NamedTuple

from losa_runtime.core.batch import SparseParams
from tests.sparse.stage import params


class Case(NamedTuple):
    """One method, or one choice of its options (choices.py).

    options: those of the suite, if not the default ones. full: further ones under which a full budget with all rows
    active is dense attention. keeps_state: whether a later step needs its opening step. opens_dense: whether the
    first steps read everything. active: rows recomputed in a later step when the request says 3 (None: it varies).
    opening: how many steps are first ones when 8 are planned. first, later: what is read to choose in the last of the
    first steps and in those behind it, "nothing", "summaries" or "keys" or a number of vectors per KV head and layer
    (None: it varies); in steps before these nothing is. rests: whether a later step may read nothing of the prefix.
    again: positions per KV head whose K/V the first step reads once more, at a budget of 16. alike: whether a row
    reads all that is loaded for its segment and KV head.
    """

    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    full: dict[str, Any] = {}  # noqa: RUF012 - never written to
    keeps_state: bool = True
    opens_dense: bool = True
    active: int | None = None
    opening: int = 1
    first: str | int | None = "nothing"
    later: str | int | None = "nothing"
    rests: bool = False
    again: int = 0
    alike: bool = True


ALL = -1  # every row of the block

CASES: dict[str, Case] = {
    "dense": Case(keeps_state=False, active=ALL),
    "quest": Case(keeps_state=False, opens_dense=False, active=ALL, first="summaries", later="summaries"),
    "losa": Case(active=3, later="summaries"),
    "losa_plus": Case(full={"tolerance": 0.0}, first="keys", later=None, again=16),
    "mage": Case(active=ALL, first="keys"),
    "sparsed": Case(active=ALL, opening=2, first="keys"),
    "flashblock": Case(full={"refresh_tokens": 0}, rests=True),
    "sparse_dllm": Case(active=ALL, opening=2, first="keys"),
    "ba_att": Case(options={"block_size": 6}, opens_dense=False, active=ALL, first="keys", later=2 * 14),
}


def usual(method: str, budget: int = 16, active: float = 3, kind: str = "count", **options: Any) -> SparseParams:
    """The suite's parameters of a method; options: further ones."""
    return params(method, budget, active, kind, **CASES[method].options | options)

"""Looking on while a stage asks its backend: which plans were made."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from losa_kernels.triton.layout import Planned
from losa_runtime.attention.questions import PrefixPlan, PrefixState, RowGroup
from tests.sparse.stage import Stage


def watch(stage: Stage, layer: int = 0) -> list[PrefixPlan]:
    """A list that grows by the plan of one layer in each forward from now on."""
    seen: list[PrefixPlan] = []
    ask = stage.backend.prefix

    def spy(at: int, q_RHD: Tensor, plan: PrefixPlan, group: RowGroup) -> PrefixState:
        if at == layer:
            seen.append(plan)
        return ask(at, q_RHD, plan, group)

    stage.backend.prefix = spy  # type: ignore[method-assign]
    return seen


def as_known(plan: PrefixPlan) -> PrefixPlan:
    """The same plan without the room in which a device makes rows and lists."""
    rows, kv = plan.rows, plan.kv
    if isinstance(rows, Planned):
        rows = rows.rows[: int(rows.indptr[-1])]
    if kv is not None:
        owners = len(kv.whole)
        if kv.per_row:
            owners = (kv.indptr.shape[0] - 1) // kv.heads if rows is None else len(rows)
        indptr = kv.indptr[: owners * kv.heads + 1]
        assert bool((kv.indptr[len(indptr) :] == indptr[-1]).all()), "a list behind the last planned row is not empty"
        assert kv.most is None or int(indptr.diff().max()) <= kv.most, "a list is longer than its bound"
        kv = kv._replace(indptr=indptr, indices=kv.indices[: int(indptr[-1])])
    return plan._replace(rows=rows, kv=kv)


def lists(plan: PrefixPlan) -> list[list[int]]:
    """The lists of a plan, in their order."""
    assert plan.kv is not None
    return [plan.kv.indices[a:b].tolist() for a, b in pairwise(plan.kv.indptr.tolist())]

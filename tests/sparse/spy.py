"""Looking on while a stage asks its backend: which plans were made."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from losa_runtime.attention.backend import AttnState, PrefixPlan, RowGroup
from tests.sparse.stage import Stage


def watch(stage: Stage, layer: int = 0) -> list[PrefixPlan]:
    """A list that grows by the plan of one layer in each forward from now on."""
    seen: list[PrefixPlan] = []
    ask = stage.backend.prefix

    def spy(at: int, q_RHD: Tensor, plan: PrefixPlan, group: RowGroup) -> AttnState:
        if at == layer:
            seen.append(plan)
        return ask(at, q_RHD, plan, group)

    stage.backend.prefix = spy  # type: ignore[method-assign]
    return seen


def lists(plan: PrefixPlan) -> list[list[int]]:
    """The lists of a plan, in their order."""
    assert plan.kv is not None
    return [plan.kv.indices[a:b].tolist() for a, b in pairwise(plan.kv.indptr.tolist())]

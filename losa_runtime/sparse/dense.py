"""Dense attention as a method: every row reads the whole prefix in every step. The yardstick of all the others."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel
from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.questions import PrefixPlan
from losa_runtime.sparse.method import SparseMethod
from losa_runtime.sparse.step import DenoiseStep


class Dense(SparseMethod):
    """Exact block diffusion, without state."""

    has_budget: ClassVar[bool] = False

    @classmethod
    def recordable(cls, options: BaseModel) -> bool:
        return True

    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        return PrefixPlan()

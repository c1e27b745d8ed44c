"""Sparse-dLLM (arXiv 2508.02558): the prefix tokens that a block keeps reading are chosen once, with its mean query.

  1. Steps 0 to `delay` of a block read the whole prefix (the paper's delayed update: one step).
  2. In the last of them, per layer: score of prefix key j = mean query of the block . k_j, without scale or softmax,
     averaged over all query heads; max-pooled over `kernel` neighbouring tokens; the best tokens are held.
  3. All later steps of the block read the held tokens, for all rows; nothing is chosen again.

Decided here, because the paper serves models without a cache of their own, whose suffix is scored and kept, too: only
the prefix is scored, as block diffusion has no suffix; its K/V are exact and frozen, so unchosen tokens are skipped
for the block and not evicted, and the next block chooses among all of them again. The budget is token_budget, so that
methods are compared at equal budgets; the paper keeps a share (`keep_ratio`). One index set serves all heads of a
layer, hence G equal lists. Ties go to the lowest token; they are common, as pooling gives the neighbours of a strong
token its score. A block that ends within its dense steps never turns sparse. A prefix within the budget is read whole.
R rows, H query heads, G KV heads, D head dim, N prefix positions.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from losa_kernels.reference.selection import top_pages
from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.questions import PrefixPlan, PrefixState
from losa_runtime.core.batch import SparseParams
from losa_runtime.core.sampling_params import MAX_COUNT, InvalidRequestValue
from losa_runtime.sparse.memory import BlockMemory, Geometry, HeldLists
from losa_runtime.sparse.method import MethodOptions, SparseMethod
from losa_runtime.sparse.step import DenoiseStep

MAX_KERNEL = 1023  # pooling costs kernel times the prefix


class SparseDllmOptions(MethodOptions):
    """delay: dense steps after the first one, the last of which chooses; 1 in the paper, 0 chooses in the first step.

    kernel: tokens that the max-pool looks at, odd; 3 in the paper, 1 is no pooling. keep_ratio: share of the prefix to
    keep, rounded up to a token; 0.5 in the paper. It takes the place of token_budget, which then means nothing; absent
    by default.
    """

    delay: int = Field(default=1, ge=0, le=MAX_COUNT)
    kernel: int = Field(default=3, ge=1, le=MAX_KERNEL)
    keep_ratio: float | None = Field(default=None, gt=0.0, le=1.0)

    @field_validator("kernel")
    @classmethod
    def _has_a_middle(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise InvalidRequestValue(
                "sparse_options.kernel", kernel, f"an odd number, e.g. {kernel - 1} or {kernel + 1}"
            )
        return kernel


class SparseDllm(SparseMethod):
    """Holds, per slot and layer, the chosen prefix tokens for the current block."""

    Options: ClassVar[type[MethodOptions]] = SparseDllmOptions

    def __init__(self, geometry: Geometry, memory: BlockMemory) -> None:
        super().__init__(geometry, memory)
        self._lists = HeldLists()

    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        self.memory.begin(layer, step)
        delay = _options(step.options).delay
        whole = tuple(number <= delay or covered for number, covered in zip(step.numbers, step.whole, strict=True))
        return PrefixPlan() if all(whole) else PrefixPlan(kv=self._lists.lists(layer, step.slots, whole))

    def complete(
        self,
        layer: int,
        q_RHD: Tensor,
        plan: PrefixPlan,
        got: PrefixState,
        step: DenoiseStep,
        backend: AttentionBackend,
    ) -> PrefixState:
        options, block = _options(step.options), step.group.block_length
        for index, segment in enumerate(step.group.segments):
            if step.numbers[index] != options.delay or step.whole[index]:
                continue
            keys_GND = backend.prefix_keys(layer, segment)
            score_N = pooled_scores(q_RHD[index * block : (index + 1) * block], keys_GND, options.kernel)
            chosen_11N = top_pages(score_N[None, None], step.budget_S[index : index + 1])
            self._lists.put(layer, step.slots[index], chosen_11N[0].expand(keys_GND.shape[:2]))
            step.meter.keys([index])
        return got

    def release(self, slot: int) -> None:
        super().release(slot)
        self._lists.close(slot)

    @classmethod
    def instead_of_budget(cls, options: MethodOptions) -> str | None:
        return None if _options(options).keep_ratio is None else "keep_ratio"

    @classmethod
    def budget(cls, params: SparseParams, prefix_len: int) -> int:
        """Tokens that are kept: token_budget, or the share of the prefix if that is set."""
        ratio = _options(params.options).keep_ratio
        return params.token_budget if ratio is None else kept_tokens(ratio, prefix_len)


def kept_tokens(ratio: float, prefix_len: int) -> int:
    """The share of the prefix, rounded up, at least one token. 0.07 of 100 is 7, though the floats' product is more."""
    return max(1, math.ceil(round(ratio * prefix_len, 9)))


def pooled_scores(q_RHD: Tensor, keys_GND: Tensor, kernel: int) -> Tensor:
    """Mean over rows and query heads of q . k, the largest among `kernel` neighbours: float32 [N]."""
    kv_heads, heads = keys_GND.shape[0], q_RHD.shape[1]
    # The mean over heads of qbar . k is one product per KV head with the sum of its heads' queries.
    q_GD = q_RHD.float().mean(0).view(kv_heads, heads // kv_heads, -1).sum(1) / heads
    score_N = (keys_GND.float() @ q_GD[..., None]).sum(0).flatten()
    pooled = torch.nn.functional.max_pool1d(score_N[None, None], kernel, stride=1, padding=kernel // 2)
    return pooled.flatten()


def _options(options: object) -> SparseDllmOptions:
    assert isinstance(options, SparseDllmOptions)
    return options

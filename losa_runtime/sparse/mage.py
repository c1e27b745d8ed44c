"""MAGE (arXiv 2602.14209, second version): the exact attention of a block's first step says what all later ones read.

First step of a block: dense prefix attention for all rows, whose output is used as it is; then, per layer,
  1. alpha_j = softmax mass on prefix key j, mean over the block's rows and the query heads of a KV group,
  2. the token_budget keys with the largest alpha are held, one set per layer and KV head.
Later steps: all rows read the held keys anew and nothing is estimated again. The next block selects afresh.

Decided here. The mass is relative to the prefix alone, whose log-sum-exp the dense step yields, so that every row has
the same say; relative to prefix and block, rows that attend to their block would count less. The paper keeps the first
two layers dense; `dense_layers` is 0 by default, because two dense layers would be most of a tiny model, and densities
of methods can only be compared with equal layers. Selecting reads all keys once more per layer. Ties go to the lowest
key. A prefix within the budget is read whole.

`layer_adaptive` is the budget of the first version (its Algorithm 1, see `layer_budgets`): every row and query head
votes for its token_budget best keys, and layers whose votes are many and scattered get more of the common budget of
token_budget keys for each sparse layer. Votes that are equal are ordered by mean mass, because the lowest key would
mean the oldest token. Padding is the most recent prefix tokens that are not chosen yet; it is needed where one KV head
won its layer more keys than another one's union has. The sets are cut when the last layer of the first step is done.
R rows, H query heads, G KV heads, D head dim, N prefix positions.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from losa_kernels.reference.selection import share_scores, top_pages
from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.questions import PrefixPlan, PrefixState
from losa_runtime.core.batch import SparseParams
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import MAX_COUNT
from losa_runtime.sparse.layer_budgets import LayerVotes, cut, share_budget, vote
from losa_runtime.sparse.memory import BlockMemory, Geometry, HeldLists
from losa_runtime.sparse.method import MethodOptions, SparseMethod
from losa_runtime.sparse.step import DenoiseStep, Part


class MageOptions(MethodOptions):
    """dense_layers: first layers that always read everything; 2 in the paper, fewer than the model has.

    layer_adaptive: share the budget among the layers as the paper's first version does; its second one has a fixed
    size. minimum_budget: K_min of that sharing, the fewest keys per KV head of a layer, at most token_budget; it may
    lift the sum over the layers. Only with layer_adaptive; the paper's value is not known, 1 if absent.
    """

    dense_layers: int = Field(default=0, ge=0, le=MAX_COUNT)
    layer_adaptive: bool = False
    minimum_budget: int | None = Field(default=None, ge=1, le=MAX_COUNT)


class Mage(SparseMethod):
    """Holds, per slot and layer, the chosen prefix tokens of each KV head for the current block."""

    Options: ClassVar[type[MethodOptions]] = MageOptions

    def __init__(self, geometry: Geometry, memory: BlockMemory) -> None:
        super().__init__(geometry, memory)
        self._lists = HeldLists()
        self._votes: dict[int, dict[int, LayerVotes]] = {}  # by slot and layer, during a first step

    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        self.memory.begin(layer, step)
        whole = tuple(first or covered for first, covered in zip(step.opens, step.whole, strict=True))
        if layer < _options(step).dense_layers or all(whole):
            return PrefixPlan()
        return PrefixPlan(kv=self._lists.lists(layer, step.slots, whole))

    def complete(
        self,
        layer: int,
        q_RHD: Tensor,
        plan: PrefixPlan,
        got: PrefixState,
        step: DenoiseStep,
        backend: AttentionBackend,
    ) -> PrefixState:
        options = _options(step)
        choosing = step.part([first and not covered for first, covered in zip(step.opens, step.whole, strict=True)])
        if choosing is None or layer < options.dense_layers:
            return got
        step.meter.keys(choosing.segments)
        got = backend.settle(got)
        q, lse = q_RHD[choosing.rows], got.lse_RH[choosing.rows]
        if options.layer_adaptive:
            self._vote(layer, q, lse, choosing, step, backend)
        else:
            self._choose(layer, q, lse, choosing, step, backend)
        return got

    def release(self, slot: int) -> None:
        super().release(slot)
        self._lists.close(slot)
        self._votes.pop(slot, None)

    @classmethod
    def check(cls, params: SparseParams, geometry: Geometry) -> None:
        options = params.options
        assert isinstance(options, MageOptions)
        if options.dense_layers >= geometry.num_layers:
            raise _refusal("dense_layers", options.dense_layers, f"fewer than the model's {geometry.num_layers} layers")
        if options.minimum_budget is None:
            return
        if not options.layer_adaptive:
            raise _refusal("minimum_budget", options.minimum_budget, "absent without layer_adaptive")
        if options.minimum_budget > params.token_budget:
            raise _refusal(
                "minimum_budget", options.minimum_budget, f"at most the token budget, here {params.token_budget}"
            )

    def _choose(
        self, layer: int, q_RHD: Tensor, lse_RH: Tensor, choosing: Part, step: DenoiseStep, backend: AttentionBackend
    ) -> None:
        """Hold the budget's keys with the largest mean mass, for the rows of the choosing segments."""
        mass_SHN = backend.prefix_mass(layer, q_RHD, lse_RH, 1, choosing.group)
        for mass_HN, index in zip(mass_SHN, choosing.segments, strict=True):
            # Cut before the mean: the order of a sum may depend on the width, which is that of the longest neighbour.
            real_HN = mass_HN[:, : step.group.prefix_lens[index]].contiguous()
            alpha_1GN = share_scores(real_HN[None], self.geometry.num_kv_heads, "mean")
            [chosen_GN] = top_pages(alpha_1GN, step.budget_S[index : index + 1])
            self._lists.put(layer, step.slots[index], chosen_GN)

    def _vote(
        self, layer: int, q_RHD: Tensor, lse_RH: Tensor, choosing: Part, step: DenoiseStep, backend: AttentionBackend
    ) -> None:
        """Keep this layer's votes; after the last layer, share the budget and hold what each layer may read."""
        block = step.group.block_length
        for place, index in enumerate(choosing.segments):
            mine, slot = slice(place * block, (place + 1) * block), step.slots[index]
            keys_GND = backend.prefix_keys(layer, step.group.segments[index])
            votes = vote(q_RHD[mine], lse_RH[mine], keys_GND, backend.scale, step.budgets[index])
            self._votes.setdefault(slot, {})[layer] = votes
            if layer == self.geometry.num_layers - 1:
                self._cut(slot, step.group.prefix_lens[index], step.budgets[index], _options(step))

    def _cut(self, slot: int, prefix_len: int, budget: int, options: MageOptions) -> None:
        pending = self._votes.pop(slot)
        assert list(pending) == list(range(options.dense_layers, self.geometry.num_layers)), "a layer did not vote"
        scores = [float(votes.score) for votes in pending.values()]
        counts = share_budget(scores, budget, options.minimum_budget or 1)
        for (layer, votes), count in zip(pending.items(), counts, strict=True):
            self._lists.put(layer, slot, cut(votes, count, prefix_len))


def _options(step: DenoiseStep) -> MageOptions:
    assert isinstance(step.options, MageOptions)
    return step.options


def _refusal(option: str, found: int, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"custom_params.sparse_options.{option}", found, allowed)

"""BA-Att (arXiv 2605.19726), adapted to blocks: keys are sorted by norm and read in blocks with good statistics.

In the first step of a block, per layer and KV head: prefix keys are sorted by L2 norm and cut into key blocks of
`block_size`; their means and variances per channel are kept, as the prefix does not change. In every step:
  1. the block's rows are pooled per query head, into a mean and a variance per channel,
  2. logit of a key block = product of the means, scaled, + beta * the variance of the token logits that the channel
     variances predict; the second term only in some layers (the paper: where the variances matter, first and last),
  3. softmax over the key blocks, per query head,
  4. all rows read the tokens of the best key blocks.

Decided here. Sorting queries by norm, too, does nothing: the rows of a diffusion block are one query block. The paper
chooses anew wherever it attends and has no dense part, hence `first_step` is sparse by default; "dense" is what the
other methods of the table do with the all-masked block, and makes them comparable. A KV group shares its list: mean of
the probabilities over its query heads. token_budget / block_size key blocks are read, rounded up, so that methods are
compared at equal budgets. Keys are sorted anew in each diffusion block, since the tokens of the last one are to be
sorted in; that reads every key once per layer. Norms ascend, so a short last key block holds the largest ones; it takes
the place of a full one. Ties go to the lowest position and key block. Were the logits in a key block Gaussian, its
weight would follow with beta = 1/2; the paper's 1 is kept.

A key block is a coarse unit: a prefix of 1,000 tokens has 8 of 128, and a budget of 128 is one of them. Where a prefix
has few, a smaller `block_size` is what helps. A prefix within the budget, rounded up to key blocks, is read whole.
Models that normalise their keys (SDAR does) give all of them nearly one norm, within 1 % in the bundled model: there
sorting scatters neighbours instead of gathering likes, and `sort=False` keeps more answers. The paper's models do not.
R rows, H query heads, G KV heads, D head dim, N prefix positions, n key blocks.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from losa_kernels.reference.selection import top_pages
from losa_runtime.attention.backend import AttentionBackend, PrefixPlan
from losa_runtime.core.batch import SparseParams
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import MAX_COUNT
from losa_runtime.sparse.key_blocks import KeyBlocks, block_logits, cut_keys, share_logits
from losa_runtime.sparse.memory import BlockMemory, Geometry, HeldLists
from losa_runtime.sparse.method import MethodOptions, SparseMethod
from losa_runtime.sparse.step import DenoiseStep

LEAST_BLOCK = 8  # tokens; the float32 statistics of fewer take more than a quarter of the memory of K/V in 16 bits


class BaAttOptions(MethodOptions):
    """block_size: tokens per key block, in requests at least LEAST_BLOCK; 128 in the paper. sort: by norm, as in the
    paper; else by position.

    beta: weight of the variance term; 1 in the paper, 0 switches it off. variance_layers: where it is used, the first
    and the last layer ("ends", as the paper), "all", or "none". first_step: whether a block's first step selects like
    the others ("sparse", as the paper has no other) or reads everything.
    """

    block_size: int = Field(default=128, ge=1, le=MAX_COUNT)
    sort: bool = True
    beta: float = Field(default=1.0, ge=0.0, le=100.0)
    variance_layers: Literal["ends", "all", "none"] = "ends"
    first_step: Literal["dense", "sparse"] = "sparse"


class BaAtt(SparseMethod):
    """Holds, per slot and layer, the key blocks of the prefix of the current block.

    Takes 8 bytes per prefix token and KV head, and two float32 vectors per key block: for K/V of head dim 64 in 16 bits
    1/32 of them, and 1/64 more by default.
    """

    Options: ClassVar[type[MethodOptions]] = BaAttOptions

    def __init__(self, geometry: Geometry, memory: BlockMemory) -> None:
        super().__init__(geometry, memory)
        self._blocks: dict[tuple[int, int], KeyBlocks] = {}
        self._lists = HeldLists()

    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        self.memory.begin(layer, step)
        dense_start = _options(step.options).first_step == "dense"
        whole = tuple((first and dense_start) or covered for first, covered in zip(step.opens, step.whole, strict=True))
        rows = step.group.block_length
        for index in range(len(step.slots)):
            if step.opens[index] and not step.whole[index]:
                self._cut(layer, index, step, backend)
            if not whole[index]:
                self._choose(layer, q_RHD[index * rows : (index + 1) * rows], index, step, backend)
        return PrefixPlan() if all(whole) else PrefixPlan(kv=self._lists.lists(layer, step.slots, whole))

    def release(self, slot: int) -> None:
        super().release(slot)
        self._lists.close(slot)
        for key in [key for key in self._blocks if key[1] == slot]:
            del self._blocks[key]

    @classmethod
    def budget(cls, params: SparseParams, prefix_len: int) -> int:
        """Tokens of the key blocks that each KV head reads: token_budget, rounded up to a multiple of block_size."""
        size = _options(params.options).block_size
        return -(-params.token_budget // size) * size

    @classmethod
    def check(cls, params: SparseParams, geometry: Geometry) -> None:
        size = _options(params.options).block_size
        if size < LEAST_BLOCK:
            raise InvalidRequest("custom_params.sparse_options.block_size", size, f"at least {LEAST_BLOCK}")

    def _cut(self, layer: int, index: int, step: DenoiseStep, backend: AttentionBackend) -> None:
        """Sort and cut the keys before a segment."""
        options, slot = _options(step.options), step.slots[index]
        keys_GND = backend.prefix_keys(layer, step.group.segments[index])
        self._blocks[layer, slot] = cut_keys(keys_GND, options.block_size, options.sort)
        step.meter.keys([index])

    def _choose(self, layer: int, q_BHD: Tensor, index: int, step: DenoiseStep, backend: AttentionBackend) -> None:
        """List the tokens of the best key blocks for the rows of a segment."""
        options, slot = _options(step.options), step.slots[index]
        blocks, beta = self._blocks[layer, slot], self._beta(layer, options)
        scores_Gn = share_logits(block_logits(q_BHD, blocks, backend.scale, beta))
        [chosen_Gn] = top_pages(scores_Gn[None], step.budget_S[index : index + 1] // options.block_size)
        positions_GN, real_GN = blocks.positions(chosen_Gn, step.group.prefix_lens[index])
        self._lists.put(layer, slot, real_GN, positions_GN)
        if not step.opens[index]:  # in the first step they were made of the keys, which are counted
            width = blocks.mean_GnD.itemsize // backend.pool.dtype.itemsize
            step.meter.vectors(index, scores_Gn.shape[1] * (2 if beta else 1) * width)

    def _beta(self, layer: int, options: BaAttOptions) -> float:
        """Weight of the variance term in this layer."""
        end = layer in (0, self.geometry.num_layers - 1)
        used = {"ends": end, "all": True, "none": False}[options.variance_layers]
        return options.beta if used else 0.0


def _options(options: object) -> BaAttOptions:
    assert isinstance(options, BaAttOptions)
    return options

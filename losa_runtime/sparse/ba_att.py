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

Key blocks by position (`sort=False`) that are whole pages are made of the moments of these pages where the pool keeps
them, else of every key; the numbers are the same to rounding. With pages of 16 that reads 1/8 of the bytes of the keys,
1/4 in 16 bits, and half of it where no variance is used. Moments take 1/16 of the memory of K/V, 1/8 in 16 bits, and
are of no use to blocks by norm, the default: so pages keep them only in an engine that is started with this method by
name (resolve.py).

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
from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.questions import PrefixPlan
from losa_runtime.cache.kv_pool import Summary
from losa_runtime.core.batch import SparseParams
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import MAX_COUNT
from losa_runtime.sparse.key_blocks import KeyBlocks, block_logits, cut_keys, join_pages, share_logits
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

    Takes two float32 vectors per key block and KV head, and 8 bytes per prefix token unless blocks go by position: for
    K/V of head dim 64 in 16 bits 1/64 of them by default, and 1/32.
    """

    Options: ClassVar[type[MethodOptions]] = BaAttOptions
    helpful: ClassVar[frozenset[Summary]] = frozenset({Summary.KEY_MOMENTS})

    def __init__(self, geometry: Geometry, memory: BlockMemory) -> None:
        super().__init__(geometry, memory)
        self._blocks: dict[tuple[int, int], KeyBlocks] = {}
        self._lists = HeldLists()

    def plan(self, layer: int, q_RHD: Tensor, step: DenoiseStep, backend: AttentionBackend) -> PrefixPlan:
        self.memory.begin(layer, step)
        options = _options(step.options)
        dense_start = options.first_step == "dense"
        whole = tuple((first and dense_start) or covered for first, covered in zip(step.opens, step.whole, strict=True))
        rows = step.group.block_length
        for index in range(len(step.slots)):
            if step.opens[index] and not step.whole[index]:
                self._cut(layer, index, step, backend)
            if not whole[index]:
                self._choose(layer, q_RHD[index * rows : (index + 1) * rows], index, step, backend)
        if all(whole):
            return PrefixPlan()
        return PrefixPlan(None, self._lists.lists(layer, step.slots, whole), 1 if options.sort else options.block_size)

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
        """Cut the prefix of a segment into key blocks."""
        options, segment, pool = _options(step.options), step.group.segments[index], backend.pool
        size, spread = options.block_size, self._beta(layer, options) > 0.0
        if not options.sort and size % pool.page_size == 0 and Summary.KEY_MOMENTS in pool.summaries:
            moments = backend.page_moments(layer, segment, spread)
            blocks = join_pages(moments, pool.page_size, segment.prefix_len, size)
            step.meter.vectors(index, moments.shape[0] * moments.shape[2] * _width(moments, backend))
        else:
            blocks = cut_keys(backend.prefix_keys(layer, segment), size, options.sort, spread)
            step.meter.keys([index])
        self._blocks[layer, step.slots[index]] = blocks

    def _choose(self, layer: int, q_BHD: Tensor, index: int, step: DenoiseStep, backend: AttentionBackend) -> None:
        """List the best key blocks for the rows of a segment, or the tokens in them."""
        options, slot = _options(step.options), step.slots[index]
        blocks, beta = self._blocks[layer, slot], self._beta(layer, options)
        scores_Gn = share_logits(block_logits(q_BHD, blocks, backend.scale, beta))
        [chosen_Gn] = top_pages(scores_Gn[None], step.budget_S[index : index + 1] // options.block_size)
        if blocks.order_Gnc is None:
            self._lists.put(layer, slot, chosen_Gn)
        else:
            positions_GN, real_GN = blocks.positions(chosen_Gn, step.group.prefix_lens[index])
            self._lists.put(layer, slot, real_GN, positions_GN)
        if not step.opens[index]:  # in the first step they were made of what is counted
            step.meter.vectors(index, scores_Gn.shape[1] * (2 if beta else 1) * _width(blocks.mean_GnD, backend))

    def _beta(self, layer: int, options: BaAttOptions) -> float:
        """Weight of the variance term in this layer."""
        end = layer in (0, self.geometry.num_layers - 1)
        used = {"ends": end, "all": True, "none": False}[options.variance_layers]
        return options.beta if used else 0.0


def _width(statistics: Tensor, backend: AttentionBackend) -> int:
    """How many vectors of the pages' dtype are as many bytes as one of these."""
    return statistics.itemsize // backend.pool.dtype.itemsize


def _options(options: object) -> BaAttOptions:
    assert isinstance(options, BaAttOptions)
    return options

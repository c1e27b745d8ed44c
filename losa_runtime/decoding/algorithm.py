"""The seam of the decoding algorithms: which of the sampled candidates of a denoising step are accepted.

An algorithm is a pure function of the candidates of some blocks. It knows no request, cache, logits or vocabulary; the
caller owns the loop and writes the accepted tokens. `registry.py` lists the algorithms, each is one small file.
Shape letters: R candidate rows, S blocks, B block length.

What an algorithm needs beyond token and confidence it declares (`needs`), and the caller finds it out for the rows of
the batch; a column that nobody needs is not there. Whether a block is done is asked of the algorithm (`finished`),
since one that edits known tokens is not done when the last mask is gone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """One sampled token for every open position of S blocks; the rows of block s are indptr_S[s] .. indptr_S[s + 1].
    Open are masks and, for an algorithm that edits, the tokens accepted before.

    token_R: int64. confidence_R: float32, see `sampling`. offset_R: int64, position in the block, 0 .. B - 1, each
    once per block; or that behind a stored segment, whose only candidate is the next block's first.
    indptr_S: int64 [S + 1], from 0 to R. step_index_S: int64, 0 for a block's first step.
    num_steps_S: int64, planned steps (T), 1 .. length_S. length_S: int64, the positions that they are planned for: B,
    or those of the open sub-block (`Window`), to which the rows and both counts of steps then belong. threshold_S,
    edit_threshold_S: float32, as confidences are. entropy_bound_S: float64. current_R: int64, what stands there now,
    masked_R: bool, whether it is a mask. post_edit_steps_S: int64. post_steps_S: int64, steps before this one that
    began without a mask.
    There if they are needed: entropy_R, margin_R: float32, see `sampling`; order_R: float64 in [0, 1), drawn at random.
    Known tokens of a block (the tail of a prompt) are never among the rows.
    """

    token_R: Tensor
    confidence_R: Tensor
    offset_R: Tensor
    indptr_S: Tensor
    step_index_S: Tensor
    num_steps_S: Tensor
    length_S: Tensor
    threshold_S: Tensor
    entropy_bound_S: Tensor
    current_R: Tensor
    masked_R: Tensor
    edit_threshold_S: Tensor
    post_edit_steps_S: Tensor
    post_steps_S: Tensor
    block_length: int
    entropy_R: Tensor | None = None
    margin_R: Tensor | None = None
    order_R: Tensor | None = None

    @property
    def block_R(self) -> Tensor:
        """int64 [R]: the number of each row's block."""
        counts_S = self.indptr_S.diff()
        numbers_S = torch.arange(len(counts_S), device=counts_S.device)
        return numbers_S.repeat_interleave(counts_S, output_size=len(self.token_R))


Need = Literal["entropy_R", "margin_R", "order_R"]
Knob = Literal["threshold", "entropy_bound", "edit_threshold", "post_edit_steps", "neighbour_penalty"]


class DecodingAlgorithm(ABC):
    """The rule by which masks become tokens. Stateless."""

    needs: ClassVar[frozenset[Need]] = frozenset()  # columns of Candidates
    knobs: ClassVar[frozenset[Knob]] = frozenset()  # what a request can set that means anything to it
    edits: ClassVar[bool] = False  # whether it may replace tokens that it has accepted, and then says when a block ends

    @abstractmethod
    def accept(self, candidates: Candidates) -> Tensor:
        """bool [R]: the rows whose tokens are accepted now; of each block that has masks at least one.

        A block's rows are judged by that block alone. A block with denoising steps T that starts with any number of
        masks is done after at most T calls, unless the algorithm edits and says otherwise.
        """

    def finished(self, candidates: Candidates, accepted_R: Tensor) -> Tensor:
        """bool [S]: the blocks that need no further step once the accepted tokens are written."""
        left_S = torch.zeros_like(candidates.num_steps_S)
        return left_S.index_add(0, candidates.block_R, (~accepted_R).to(left_S.dtype)) == 0


class Verdict(NamedTuple):
    """accepted_R: bool, rows whose tokens are accepted. finished_S: bool, blocks that need no further step then."""

    accepted_R: Tensor
    finished_S: Tensor


def accept(algorithms: Sequence[DecodingAlgorithm], candidates: Candidates) -> Verdict:
    """Apply block s's own `algorithms[s]`, one call for each distinct algorithm."""
    different = tuple(dict.fromkeys(algorithms))
    for algorithm in different:
        assert all(getattr(candidates, name) is not None for name in algorithm.needs), "sampled without what it needs"
    if len(different) == 1:  # as nearly always: nothing is to be told apart
        accepted_R = different[0].accept(candidates)
        return Verdict(accepted_R, different[0].finished(candidates, accepted_R))
    accepted_R = torch.zeros_like(candidates.token_R, dtype=torch.bool)
    finished_S = torch.zeros_like(candidates.num_steps_S, dtype=torch.bool)
    block_R = candidates.block_R
    for algorithm in different:
        mine_S = torch.tensor([a is algorithm for a in algorithms], device=block_R.device)
        mine_R = mine_S[block_R]
        mine = _select(candidates, mine_S, mine_R)
        accepted_R[mine_R] = yes_R = algorithm.accept(mine)
        finished_S[mine_S] = algorithm.finished(mine, yes_R)
    return Verdict(accepted_R, finished_S)


def num_transfer(step: int, num_steps: int, block_length: int) -> int:
    """Planned number of tokens of a step: B // T, one more in the first B % T steps, none after the plan."""
    if step >= num_steps:
        return 0
    return block_length // num_steps + (step < block_length % num_steps)


def quota(candidates: Candidates) -> Tensor:
    """int64 [S]: how many rows each block accepts by plan: `num_transfer` of its length, but at most and at least what
    must be.

    At most the rows there are. In the last planned step all of them: a block that began with fewer masks than B has
    nothing left by then anyhow, so this only bounds a block that was disturbed.
    """
    B_S, T_S, step_S = candidates.length_S, candidates.num_steps_S, candidates.step_index_S
    rows_S = candidates.indptr_S.diff()
    planned_S = B_S // T_S + (step_S < B_S % T_S).to(torch.int64)
    return torch.where(step_S >= T_S - 1, rows_S, torch.minimum(planned_S, rows_S))


def rank(candidates: Candidates, key_R: Tensor | None = None) -> Tensor:
    """int64 [R]: place of each row within its block by descending key, ties (and no key) by ascending offset."""
    order_R = candidates.offset_R.argsort(stable=True)
    if key_R is not None:
        order_R = order_R[key_R[order_R].argsort(descending=True, stable=True)]
    block_R = candidates.block_R
    order_R = order_R[block_R[order_R].argsort(stable=True)]
    rank_R = torch.empty_like(order_R)
    rank_R[order_R] = torch.arange(len(order_R), device=order_R.device) - candidates.indptr_S[block_R]
    return rank_R


def _select(candidates: Candidates, mine_S: Tensor, mine_R: Tensor) -> Candidates:
    counts_S = candidates.indptr_S.diff()[mine_S]
    measured = {name: getattr(candidates, name) for name in get_args(Need)}
    return Candidates(
        token_R=candidates.token_R[mine_R],
        confidence_R=candidates.confidence_R[mine_R],
        offset_R=candidates.offset_R[mine_R],
        indptr_S=torch.cat((counts_S.new_zeros(1), counts_S.cumsum(0))),
        step_index_S=candidates.step_index_S[mine_S],
        num_steps_S=candidates.num_steps_S[mine_S],
        length_S=candidates.length_S[mine_S],
        threshold_S=candidates.threshold_S[mine_S],
        block_length=candidates.block_length,
        entropy_bound_S=candidates.entropy_bound_S[mine_S],
        current_R=candidates.current_R[mine_R],
        masked_R=candidates.masked_R[mine_R],
        edit_threshold_S=candidates.edit_threshold_S[mine_S],
        post_edit_steps_S=candidates.post_edit_steps_S[mine_S],
        post_steps_S=candidates.post_steps_S[mine_S],
        **{name: None if column is None else column[mine_R] for name, column in measured.items()},
    )

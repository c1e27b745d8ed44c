"""Joint threshold: sure masks are filled, and tokens of the block that the model now sees otherwise are replaced.

Rule, with a token x and its confidence sampled for every position of the block that is not given:
fill: masks with confidence > threshold (strictly); if there are masks but none is so sure, the surest of them, ties to
  the lowest position.
edit: positions with a token other than x, where confidence > edit_threshold; all at once, beside the fills.
end: a step that began without a mask and edited nothing, or the `post_edit_steps`-th that began without one; with 0 the
  block ends with its last mask.
Before sampling, `neighbour_penalty` is taken off the logit of the token that stands on the left in the same block,
against repetitions; nothing is taken off at a block's first position, nor for a mask.
The planned steps are not read: a block takes at most one step for each mask and `post_edit_steps` more. Given tokens
(the tail of a prompt, and with shifted logits a block's first) and finished blocks are never edited. Under a grammar
nothing is, as tokens that fit together need not do so after an edit: masks are filled by the same rule, and the block
ends with the last one. Confidence: unfiltered, tempered probability of the sampled token (`sampling`).
Source: token editing of LLaDA2.1, as its public generation loops and SGLang's JointThreshold have it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from losa_runtime.decoding.algorithm import Candidates, DecodingAlgorithm, Knob, rank


class JointThreshold(DecodingAlgorithm):
    """All sure fills, at least one; all sure edits."""

    edits: ClassVar[bool] = True
    knobs: ClassVar[frozenset[Knob]] = frozenset(
        {"threshold", "edit_threshold", "post_edit_steps", "neighbour_penalty"}
    )

    def accept(self, candidates: Candidates) -> Tensor:
        """bool [R], see the module."""
        block_R, masked_R, confidence_R = candidates.block_R, candidates.masked_R, candidates.confidence_R
        sure_R = confidence_R > candidates.threshold_S[block_R]
        filled_S = _any(sure_R & masked_R, candidates)
        # Masks come first in this order, so its head is the surest mask of a block that has one.
        order_R = rank(candidates, torch.where(masked_R, confidence_R, -torch.inf))
        surest_R = (order_R == 0) & ~filled_S[block_R]
        changes_R = candidates.token_R != candidates.current_R
        edits_R = changes_R & (confidence_R > candidates.edit_threshold_S[block_R])
        return torch.where(masked_R, sure_R | surest_R, edits_R)

    def finished(self, candidates: Candidates, accepted_R: Tensor) -> Tensor:
        """bool [S], see the module."""
        began_S = ~_any(candidates.masked_R, candidates)  # without a mask
        left_S = _any(candidates.masked_R & ~accepted_R, candidates)
        last_S = candidates.post_steps_S + began_S.to(torch.int64) >= candidates.post_edit_steps_S
        return ~left_S & ((began_S & ~_any(accepted_R, candidates)) | last_S)


def _any(yes_R: Tensor, candidates: Candidates) -> Tensor:
    """bool [S]: whether any row of the block is so."""
    count_S = torch.zeros_like(candidates.num_steps_S).index_add(0, candidates.block_R, yes_R.to(torch.int64))
    return count_S > 0

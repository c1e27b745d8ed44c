"""Sequential: from left to right, a planned number of positions per step.

Rule: accept the n leftmost masks of the block, n = B // T (+ 1 in the first B % T steps), all that is left in the last
planned step. Confidence: not read. Fallback and ties: none, offsets are distinct.
Source: SDAR's public generation loop (remasking strategy "sequential").
"""

from __future__ import annotations

from torch import Tensor

from losa_runtime.decoding.algorithm import Candidates, DecodingAlgorithm, quota, rank


class Sequential(DecodingAlgorithm):
    """The n leftmost masks."""

    def accept(self, candidates: Candidates) -> Tensor:
        """bool [R], see the module."""
        return rank(candidates) < quota(candidates)[candidates.block_R]

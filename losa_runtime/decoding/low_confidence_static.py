"""Low confidence, static: the surest candidates first, a planned number per step; the unsure ones stay masked.

Rule: accept the n candidates of the greatest confidence, n = B // T (+ 1 in the first B % T steps), all that is left in
the last planned step. Confidence: unfiltered, tempered probability of the sampled token (`sampling`).
Fallback: none. Ties: the lowest position.
Source: LLaDA (Nie et al. 2025, arXiv 2502.09992, low-confidence remasking); schedule as in SDAR's generation loop.
"""

from __future__ import annotations

from torch import Tensor

from losa_runtime.decoding.algorithm import Candidates, DecodingAlgorithm, quota, rank


class LowConfidenceStatic(DecodingAlgorithm):
    """The n surest candidates."""

    def accept(self, candidates: Candidates) -> Tensor:
        """bool [R], see the module."""
        return rank(candidates, candidates.confidence_R) < quota(candidates)[candidates.block_R]

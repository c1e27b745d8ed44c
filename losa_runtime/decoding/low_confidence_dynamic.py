"""Low confidence, dynamic: every candidate that is sure enough, but never fewer than the plan asks for.

Rule: let H be the candidates with confidence > threshold (strictly) and n = B // T (+ 1 in the first B % T steps, all
that is left in the last planned step). Accept H if it has at least n members, else the n of the greatest confidence.
Confidence: unfiltered, tempered probability of the sampled token (`sampling`). Fallback: the n surest; with threshold 1
that is always taken, and the algorithm is the static one. Ties: the lowest position.
Source: SDAR's evaluation loop (remasking strategy "low_confidence_dynamic"); the threshold idea is Fast-dLLM's
(Wu et al. 2025, arXiv 2505.22618).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from losa_runtime.decoding.algorithm import Candidates, DecodingAlgorithm, Knob, quota, rank


class LowConfidenceDynamic(DecodingAlgorithm):
    """All sure candidates, at least the n surest."""

    knobs: ClassVar[frozenset[Knob]] = frozenset({"threshold"})

    def accept(self, candidates: Candidates) -> Tensor:
        """bool [R], see the module."""
        block_R, quota_S = candidates.block_R, quota(candidates)
        sure_R = candidates.confidence_R > candidates.threshold_S[block_R]
        sure_S = torch.zeros_like(quota_S).index_add(0, block_R, sure_R.to(quota_S.dtype))
        enough_R = (sure_S >= quota_S)[block_R]
        best_R = rank(candidates, candidates.confidence_R) < quota_S[block_R]
        return torch.where(enough_R, sure_R, best_R)

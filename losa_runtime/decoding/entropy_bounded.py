"""Entropy bounded: as many of the least uncertain candidates as stay within a bound together, but at least the plan's.

Rule: order the candidates by ascending entropy. Accept the longest run from the front whose entropies add up to at most
`entropy_bound` (nats), but at least n = B // T (+ 1 in the first B % T steps, all that is left in the last planned
step). Entropy: of the unfiltered, tempered distribution (`sampling`). Fallback: the n least uncertain; with T = B that
is one. Ties: the lowest position.
Source: SDAR's evaluation loop (remasking strategy "entropy_bounded"); the idea is that of entropy-bounded unmasking
(Ben-Hamu et al. 2025, arXiv 2505.24857), whose bound leaves the greatest entropy out of the sum. Here all count.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from losa_runtime.decoding.algorithm import Candidates, DecodingAlgorithm, Knob, Need, quota, rank


class EntropyBounded(DecodingAlgorithm):
    """The least uncertain candidates, within a bound on the sum of their entropies; at least the planned number."""

    needs: ClassVar[frozenset[Need]] = frozenset({"entropy_R"})
    knobs: ClassVar[frozenset[Knob]] = frozenset({"entropy_bound"})

    def accept(self, candidates: Candidates) -> Tensor:
        """bool [R], see the module."""
        entropy_R, block_R = candidates.entropy_R, candidates.block_R
        assert entropy_R is not None
        rank_R = rank(candidates, -entropy_R)
        # One line per block, so that a block's sum does not depend on the others.
        sums_SB = torch.zeros(len(candidates.num_steps_S), candidates.block_length, dtype=torch.float64)
        sums_SB = sums_SB.to(entropy_R.device)
        sums_SB[block_R, rank_R] = entropy_R.double()
        within_R = sums_SB.cumsum(-1)[block_R, rank_R] <= candidates.entropy_bound_S[block_R]
        return within_R | (rank_R < quota(candidates)[block_R])

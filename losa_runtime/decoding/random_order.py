"""Random: positions in an order that is drawn, a planned number per step.

Rule: accept n candidates, each set of n equally likely, n = B // T (+ 1 in the first B % T steps, all that is left in
the last planned step). Confidence: not read. The order comes from the request's seed, the positions and the step, by
numbers that are not those of the tokens' draw: the same seed gives the same order alone and in any company.
Fallback: none. Ties: the lowest position.
Source: the ancestral order of masked diffusion models (e.g. LLaDA's "random" remasking, arXiv 2502.09992).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from losa_runtime.decoding.algorithm import Candidates, DecodingAlgorithm, Need, quota, rank


class RandomOrder(DecodingAlgorithm):
    """n candidates by lot."""

    needs: ClassVar[frozenset[Need]] = frozenset({"order_R"})

    def accept(self, candidates: Candidates) -> Tensor:
        """bool [R], see the module."""
        return rank(candidates, candidates.order_R) < quota(candidates)[candidates.block_R]

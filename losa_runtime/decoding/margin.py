"""Margin: the candidates whose likeliest token is furthest ahead of the next one first, a planned number per step.

Rule: accept the n candidates with the greatest difference between the two greatest probabilities of their unfiltered,
tempered distribution (`sampling`), n = B // T (+ 1 in the first B % T steps, all that is left in the last planned
step). Which token was sampled does not matter. Fallback: none. Ties: the lowest position.
Source: the top probability margin of Kim et al. 2025 (arXiv 2502.06768); also an option of Dream's generation loop.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from losa_runtime.decoding.algorithm import Candidates, DecodingAlgorithm, Need, quota, rank


class Margin(DecodingAlgorithm):
    """The n candidates with the greatest margin."""

    needs: ClassVar[frozenset[Need]] = frozenset({"margin_R"})

    def accept(self, candidates: Candidates) -> Tensor:
        """bool [R], see the module."""
        return rank(candidates, candidates.margin_R) < quota(candidates)[candidates.block_R]

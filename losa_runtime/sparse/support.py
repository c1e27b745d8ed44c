"""Choosing the support of a block from its dense first step: the tokens that some row gives the largest softmax mass.

Scores are logarithms of softmax mass. The largest score of a page is that of its best token, so the best n tokens lie
in the best n pages; few pages hold nearly all of them.
R rows of one block, H query heads, G KV heads, X = R * H / G folded rows, D head dim, P pages, N candidate positions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels.reference.attention import fold_heads, unfold_heads
from losa_kernels.reference.selection import top_pages
from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.core.batch import Segment


class Candidates(NamedTuple):
    """Tokens among which the support is chosen. positions: int64, ascending per KV head; keys: float32; scores: log of
    the softmax mass that each folded row gives them, float32, -inf behind the prefix.
    """

    positions_GN: Tensor
    keys_GND: Tensor
    scores_GXN: Tensor

    def mean_keys(self, taken_GN: Tensor, rows: int) -> Tensor:
        """Mean key of the candidates that are not taken, weighted by mass, per row and query head: [R, H, D].

        Zero where nothing is left.
        """
        left_GXN = self.scores_GXN.masked_fill(taken_GN[:, None], -torch.inf)
        nothing = (left_GXN == -torch.inf).all(-1, keepdim=True)
        weights_GXN = left_GXN.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
        mean_GXD = weights_GXN @ self.keys_GND
        return unfold_heads(mean_GXD, mean_GXD[..., 0], rows)[0]


def page_scores(peaks_RHP: Tensor, lse_RH: Tensor, kv_heads: int) -> Tensor:
    """The largest score in each page over rows and heads, from each row's largest scaled q . k: float32 [G, P]."""
    best_HP = (peaks_RHP - lse_RH[..., None]).amax(0)
    return best_HP.view(kv_heads, -1, best_HP.shape[-1]).amax(1)


def candidates(
    layer: int, q_RHD: Tensor, lse_RH: Tensor, chosen_GP: Tensor, segment: Segment, backend: AttentionBackend
) -> Candidates:
    """All tokens of the chosen pages, as many for each KV head, scored by their keys. lse_RH: of the whole prefix."""
    pool = backend.pool
    pages_GC = chosen_GP.nonzero()[:, -1].view(pool.num_kv_heads, -1)
    inside = torch.arange(pool.page_size, device=pages_GC.device)
    positions_GN = (pages_GC[..., None] * pool.page_size + inside).flatten(1)
    beyond_GN = positions_GN >= segment.prefix_len
    keys_GND = backend.keys_at(layer, segment, positions_GN.masked_fill(beyond_GN, 0)).float()
    q_GXD = fold_heads(q_RHD.float(), pool.num_kv_heads)
    lse_GX1 = fold_heads(lse_RH[..., None], pool.num_kv_heads)
    scores_GXN = q_GXD @ keys_GND.transpose(1, 2) * backend.scale - lse_GX1
    return Candidates(positions_GN, keys_GND, scores_GXN.masked_fill(beyond_GN[:, None], -torch.inf))


def best_granules(scores_GP: Tensor, count: int, least_mass: float | None = None) -> Tensor:
    """The `count` best of each KV head, ties to the lowest, without those of at most `least_mass`: bool [G, P].

    least_mass: 0 leaves out what is behind the prefix; None = exactly `count`, whatever they hold.
    """
    most = min(count, scores_GP.shape[1])
    chosen_GP = top_pages(scores_GP[None], torch.tensor([most], device=scores_GP.device))[0]
    if least_mass is None:
        return chosen_GP
    return chosen_GP & ~(scores_GP <= (math.log(least_mass) if least_mass else -torch.inf))

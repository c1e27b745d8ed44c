"""One token budget for all layers: votes for keys, a score per layer, and the cut.

From the first version of MAGE (arXiv 2602.14209v1, Algorithm 1). Pure functions of one segment's tensors: keeps no
state and knows no step, no slot and no page.
R rows of the segment, H query heads, G KV heads, D head dim, N prefix positions, X = R * H / G voters of a KV head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels.reference.selection import key_mass, top_pages


class LayerVotes(NamedTuple):
    """What one layer would read, before it knows its budget.

    ranked: per KV head the union of what its voters chose, int64, best first. score: the layer's claim on the common
    budget, a float64 scalar on the device.
    """

    ranked: tuple[Tensor, ...]
    score: Tensor


def vote(q_RHD: Tensor, lse_RH: Tensor, keys_GND: Tensor, scale: float, count: int) -> LayerVotes:
    """Each row votes with each query head for the `count` keys (at most N) that hold most of its softmax mass.

    score = max over KV heads of |U| (1 - log p): U the union, p the share of the mass that lies in it, mean over the
    voters. Ranked by votes; votes are small numbers and often equal, so then by mean mass, then the lowest key first.
    """
    rows, heads, dim = q_RHD.shape
    groups = keys_GND.shape[0]
    # Each pair of row and head poses as a head of one row: the mass then comes out before any mean.
    q_1VD = q_RHD.view(rows, groups, -1, dim).transpose(0, 1).reshape(1, rows * heads, dim)
    lse_1V = lse_RH.view(rows, groups, -1).transpose(0, 1).reshape(1, rows * heads)
    mass_GXN = key_mass(q_1VD, lse_1V, keys_GND, scale).view(groups, rows * heads // groups, -1)
    chosen_GXN = top_pages(mass_GXN, torch.full((groups,), count, device=mass_GXN.device))
    votes_GN = chosen_GXN.sum(1)
    union_GN = votes_GN > 0
    covered_G = (mass_GXN * union_GN[:, None]).sum(-1, dtype=torch.float64).mean(-1).clamp(max=1.0)
    sizes_G = union_GN.sum(-1)
    by_mass_GN = mass_GXN.mean(1).argsort(dim=-1, descending=True, stable=True)
    by_votes_GN = votes_GN.gather(1, by_mass_GN).argsort(dim=-1, descending=True, stable=True)
    order_GN = by_mass_GN.gather(1, by_votes_GN)
    ranked = tuple(order[:size] for order, size in zip(order_GN, sizes_G.tolist(), strict=True))
    return LayerVotes(ranked, (sizes_G * (1.0 - covered_G.log())).max())


def share_budget(scores: Sequence[float], budget: int, minimum: int) -> list[int]:
    """Keys per KV head and layer: max(minimum, floor(s_l / sum of s * budget * L)) for L layers.

    Scores that are not numbers come with attention that is none either, and end the request; until then all are equal.
    """
    if not all(math.isfinite(score) for score in scores):
        scores = [1.0] * len(scores)
    total = math.fsum(scores)
    return [max(minimum, math.floor(score * budget * len(scores) / total)) for score in scores]


def cut(votes: LayerVotes, count: int, length: int) -> Tensor:
    """The `count` first keys of each KV head's ranking, as a mask over N = `length` keys: bool [G, N].

    A union that has fewer is filled up with the most recent keys outside it; no more than N can be read.
    """
    chosen_GN = torch.zeros(len(votes.ranked), length, dtype=torch.bool, device=votes.score.device)
    for chosen, ranked in zip(chosen_GN, votes.ranked, strict=True):
        chosen[ranked[:count]] = True
        lacking = count - ranked.shape[0]
        if lacking > 0:
            chosen[(~chosen).nonzero().flatten()[-lacking:]] = True
    return chosen_GN

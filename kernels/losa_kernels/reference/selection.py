"""Which pages and which rows: page bounds, top-k, union over rows, query change, active rows.

Every choice breaks ties towards the lowest index, so that a result never depends on a sorting routine or on padding.
R query rows, H query heads, G KV heads, D head dim, P pages, S segments, B block length.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Share = Literal["max", "mean", "none"]  # how the query heads of a KV head come to one list, or that they do not


def page_scores(q_RHD: Tensor, bounds_PG2D: Tensor) -> Tensor:
    """Upper bound of q . k over the keys of each page, unscaled: float32 [R, H, P] (QUEST, arXiv 2406.10774, eq. 1).

    max(q m, q M) per channel is q+ M + q- m, so the bound is one matrix product [q+, q-] . [M; m] per KV head.
    bounds_PG2D: as `key_bounds` gives them, maximum first.
    """
    rows, heads, dim = q_RHD.shape
    pages, groups = bounds_PG2D.shape[:2]
    q_GXD = q_RHD.float().view(rows, groups, -1, dim).transpose(0, 1).reshape(groups, -1, dim)
    halves = torch.cat((q_GXD.clamp(min=0.0), q_GXD.clamp(max=0.0)), dim=-1)
    bounds = bounds_PG2D.float().flatten(2).permute(1, 2, 0)  # [G, 2 D, P], a view
    scores = (halves @ bounds).view(groups, rows, heads // groups, pages)
    return scores.transpose(0, 1).reshape(rows, heads, pages)


def share_scores(scores_RHP: Tensor, groups: int, share: Share = "max", heads_RH: Tensor | None = None) -> Tensor:
    """One score per list of a row from those of its query heads: [R, E, P], E = groups, or H where none share.

    heads_RH: bool, the heads that take part (None: all); the scores of a list without any mean nothing.
    """
    rows, heads, pages = scores_RHP.shape
    if share == "none":
        return scores_RHP
    grouped_RGFP = scores_RHP.view(rows, groups, heads // groups, pages)
    left_out = None if heads_RH is None else ~heads_RH.view(rows, groups, -1, 1)
    if share == "max":
        return (grouped_RGFP if left_out is None else grouped_RGFP.masked_fill(left_out, -torch.inf)).amax(2)
    if left_out is None:
        return _sum_in_order(grouped_RGFP) / (heads // groups)
    count_RG1 = (~left_out).sum(2).clamp(min=1)
    return _sum_in_order(grouped_RGFP.masked_fill(left_out, 0.0)) / count_RG1


def share_heads(heads_RH: Tensor, groups: int, share: Share = "max") -> Tensor:
    """Which lists of a row have a query head that takes part: bool [R, E], as in `share_scores`."""
    return heads_RH if share == "none" else heads_RH.view(heads_RH.shape[0], groups, -1).any(-1)


def _sum_in_order(grouped_RGFP: Tensor) -> Tensor:
    """Sum over F, head by head: in torch's own reduction the order depends on the width, so on padding."""
    total_RGP = grouped_RGFP[:, :, 0]
    for head in range(1, grouped_RGFP.shape[2]):
        total_RGP = total_RGP + grouped_RGFP[:, :, head]
    return total_RGP


def top_pages(scores_RGP: Tensor, count_R: Tensor) -> Tensor:
    """The count_R[r] best pages of each row and head: bool [R, G, P]. Padding is -inf; 1 <= count <= real pages.

    NaN counts as infinite: a broken page is read, so that its reader finds out, and no list comes out too short.
    """
    scores_RGP = scores_RGP.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    most = int(count_R.max())
    best = torch.topk(scores_RGP, most, dim=-1).values
    last = (count_R - 1)[:, None, None].expand(*scores_RGP.shape[:2], 1)
    bar = best.gather(-1, last)
    above, level = scores_RGP > bar, scores_RGP == bar
    room = count_R[:, None, None] - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))


def union_rows(chosen_RGP: Tensor, segment_R: Tensor, segments: int) -> Tensor:
    """What any row of a segment chose: bool [segments, G, P]; segments without rows get nothing."""
    votes = torch.zeros(segments, *chosen_RGP.shape[1:], dtype=torch.int32, device=chosen_RGP.device)
    return votes.index_add_(0, segment_R, chosen_RGP.to(torch.int32)) > 0


def page_peaks(q_RHD: Tensor, keys_GND: Tensor, scale: float, page_size: int) -> Tensor:
    """Largest scale q . k over the keys of each page, per row and query head: float32 [R, H, ceil(N / page_size)]."""
    rows, heads, dim = q_RHD.shape
    groups, length = keys_GND.shape[:2]
    q_GXD = q_RHD.float().view(rows, groups, -1, dim).transpose(0, 1).reshape(groups, -1, dim)
    scores_GXN = (q_GXD @ keys_GND.float().transpose(1, 2)) * scale
    padded = torch.nn.functional.pad(scores_GXN, (0, -length % page_size), value=-torch.inf)
    peaks = padded.view(groups, rows, heads // groups, -1, page_size).amax(-1)
    return peaks.transpose(0, 1).reshape(rows, heads, -1)


def key_mass(
    q_RHD: Tensor,
    lse_RH: Tensor,
    keys_GND: Tensor,
    scale: float,
    granule: int = 1,
    over_rows: Literal["mean", "max"] = "mean",
) -> Tensor:
    """Softmax mass of the granules of N keys per query head, mean or maximum over the rows: float32 [H, n].

    exp(scale q . k - lse), summed over the keys of a granule; n = ceil(N / granule). lse_RH: natural; -inf gives no
    mass.
    """
    rows, heads, dim = q_RHD.shape
    groups, length = keys_GND.shape[:2]
    mass_Hn = []
    for group in range(groups):
        mine = slice(group * heads // groups, (group + 1) * heads // groups)
        logits_RFN = (q_RHD[:, mine].float().reshape(-1, dim) @ keys_GND[group].float().T * scale).view(
            rows, heads // groups, length
        )
        lse_RF1 = lse_RH[:, mine, None]
        mass_RFN = torch.exp(logits_RFN - lse_RF1.masked_fill(lse_RF1 == -torch.inf, torch.inf))
        padded = torch.nn.functional.pad(mass_RFN, (0, -length % granule))
        mass_RFn = padded.unflatten(2, (padded.shape[2] // granule, granule)).sum(-1)
        mass_Hn.append(mass_RFn.mean(0) if over_rows == "mean" else mass_RFn.amax(0))
    return torch.cat(mass_Hn)


def query_change(now_SBHD: Tensor, before_SBHD: Tensor, per_head: bool = False) -> Tensor:
    """Mean squared difference of each token's query over all heads and channels: float32 [S, B]; per_head: [S, B, H].

    A rotation of both queries leaves it as it is, so it may be taken before or after RoPE.
    """
    square_SBHD = (now_SBHD.float() - before_SBHD.float()).square()
    return square_SBHD.mean(-1) if per_head else square_SBHD.mean(dim=(-1, -2))


def active_rows(change_SB: Tensor, count_S: Tensor, tau_S: Tensor) -> Tensor:
    """The most changed rows of each segment: bool [S, B].

    A row is active if it is among the count_S[s] most changed ones, or if the rows above it hold less than the share
    tau_S[s] of the segment's total change. count 0 and tau 0 switch their rule off.
    """
    ordered, order = torch.sort(change_SB, dim=-1, descending=True, stable=True)
    rank = torch.arange(change_SB.shape[1], device=change_SB.device)
    above = ordered.cumsum(-1) - ordered
    picked = (rank < count_S[:, None]) | (above < tau_S[:, None] * ordered.sum(-1, keepdim=True))
    return torch.zeros_like(picked).scatter_(1, order, picked)

"""Softmax attention with its log-sum-exp, and the merging of parts. All arithmetic in float32.

R query rows, H query heads, G KV heads, F = H / G query heads per KV head, D head dim, N key positions,
X any leading dimensions. `lse` is the natural logarithm; an empty key list gives out 0 and lse -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels.reference.paging import gather_pages, gather_rows, position_rows

REMAINDER = 1e-4


def fold_heads(q_RHD: Tensor, groups: int) -> Tensor:
    """Queries that share a KV head become rows of one matrix: [R, H, D] -> [groups, R * H / groups, D]."""
    rows, heads, dim = q_RHD.shape
    return q_RHD.view(rows, groups, heads // groups, dim).transpose(0, 1).reshape(groups, -1, dim)


def unfold_heads(out_GXD: Tensor, lse_GX: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Inverse of `fold_heads` for a result: out [R, H, D] and lse [R, H]."""
    groups, folded, dim = out_GXD.shape
    share = folded // rows
    out_RHD = out_GXD.view(groups, rows, share, dim).transpose(0, 1).reshape(rows, groups * share, dim)
    return out_RHD, lse_GX.view(groups, rows, share).transpose(0, 1).reshape(rows, groups * share)


def attend(
    q_XRD: Tensor, k_XND: Tensor, v_XND: Tensor, scale: float, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and its log-sum-exp: float32 [X, R, D] and [X, R].

    allowed: bool, broadcastable to [X, R, N]; False positions are left out but must hold finite values.
    """
    scores = (q_XRD.float() @ k_XND.float().transpose(-1, -2)) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return weights @ v_XND.float(), lse


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key lists from the two parts: float32 [X, D] and [X].

    out: normalised [X, D]. lse: natural [X], -inf for an empty part. Two empty parts give out 0, lse -inf.
    Online softmax (LoSA, arXiv 2604.12056, merge of prefix and in-block attention).
    """
    top = torch.maximum(lse_a, lse_b)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    out = weight_a[..., None] * out_a.float() + weight_b[..., None] * out_b.float()
    return out / total.masked_fill(total == 0.0, 1.0)[..., None], top + torch.log(total)


def renew_states(
    kept_out: Tensor,
    kept_lse: Tensor,
    place_R: Tensor,
    fresh_out: Tensor,
    fresh_lse: Tensor,
    rows: Tensor | None = None,
    heads_nH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace remembered states by fresh ones and give those of all rows: float32 out [R, H, D] and lse [R, H].

    kept_out: [Y, H, D] and kept_lse: [Y, H], written to. place_R: int64, each row's place there, no two the same. rows:
    int64, the n rows with a fresh state (None: all), fresh_out [n, H, D] and fresh_lse [n, H]. heads_nH: bool, the
    heads whose fresh state counts (None: all).
    """
    place_n = place_R if rows is None else place_R[rows]
    for kept, fresh in ((kept_out, fresh_out), (kept_lse, fresh_lse)):
        if heads_nH is not None:
            chosen_nH = heads_nH.view(*heads_nH.shape, *[1] * (fresh.ndim - 2))
            fresh = torch.where(chosen_nH, fresh, kept[place_n])
        kept.index_copy_(0, place_n, fresh)
    return kept_out[place_R], kept_lse[place_R]


def remove_state(out: Tensor, lse: Tensor, out_part: Tensor, lse_part: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of a list that are not in a part of it, the inverse of `merge_states`: [X, D] and [X].

    What remains with less than 1e-4 of the weight is lost in float32 and given as nothing (0 and -inf).
    """
    rest = 1.0 - torch.exp(lse_part - lse.masked_fill(lse == -torch.inf, torch.inf))
    left = rest > REMAINDER
    divisor = rest.masked_fill(~left, 1.0)
    remaining = (out - (1.0 - divisor)[..., None] * out_part) / divisor[..., None]
    lse_rest = (lse + torch.log(divisor)).masked_fill(~left, -torch.inf)
    return remaining.masked_fill(~left[..., None], 0.0), lse_rest


def block_attention(q_SBHD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Bidirectional attention of each block to itself: out [S, B, H, D], lse [S, B, H]."""
    segments, length, heads, dim = q_SBHD.shape
    groups = k_SBGD.shape[2]
    q = q_SBHD.view(segments, length, groups, heads // groups, dim).permute(0, 2, 3, 1, 4)
    k, v = (x.permute(0, 2, 1, 3)[:, :, None] for x in (k_SBGD, v_SBGD))
    out, lse = attend(q, k, v, scale)
    return out.permute(0, 3, 1, 2, 4).reshape(q_SBHD.shape), lse.permute(0, 3, 1, 2).reshape(segments, length, heads)


def prefix_attention(
    q_RHD: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, prefix_len: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of one request's rows to its whole prefix: out [R, H, D], lse [R, H]."""
    groups, page_size = k_cache.shape[1:3]
    table = pages[: -(-prefix_len // page_size)]
    k, v = (gather_pages(cache, table)[:, :prefix_len] for cache in (k_cache, v_cache))
    return unfold_heads(*attend(fold_heads(q_RHD, groups), k, v, scale), rows=q_RHD.shape[0])


def listed_attention(
    q_RHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages: Tensor,
    positions_En: Tensor,
    listed_En: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of one request's rows to listed prefix positions: out [R, H, D], lse [R, H].

    positions_En: int64, E = G (one list per KV head) or E = H lists, padded with any stored position where the
    bool listed_En is False.
    """
    lists, (heads, page_size) = positions_En.shape[0], k_cache.shape[1:3]
    of_head = torch.arange(lists, device=pages.device) * heads // lists
    place = position_rows(pages, positions_En, of_head, heads, page_size)
    k, v = (gather_rows(cache, place) for cache in (k_cache, v_cache))
    got = attend(fold_heads(q_RHD, lists), k, v, scale, listed_En[:, None, :])
    return unfold_heads(*got, rows=q_RHD.shape[0])


def block_causal_attention(
    q_RHD: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, prefix_len: int, block_length: int, scale: float
) -> Tensor:
    """Rows prefix_len .. prefix_len + R of one request, already stored, see every position up to the end of their own
    block: out [R, H, D] float32. prefix_len and R are multiples of the block length.
    """
    rows, groups, page_size = q_RHD.shape[0], k_cache.shape[1], k_cache.shape[2]
    end = prefix_len + rows
    table = pages[: -(-end // page_size)]
    k, v = (gather_pages(cache, table)[:, :end] for cache in (k_cache, v_cache))
    block_of = torch.arange(end, device=pages.device) // block_length
    allowed_RN = block_of[prefix_len:, None] >= block_of
    allowed = allowed_RN.repeat_interleave(q_RHD.shape[1] // groups, dim=0)
    return unfold_heads(*attend(fold_heads(q_RHD, groups), k, v, scale, allowed), rows=rows)[0]

"""Where K/V lies: storing rows into pages, gathering them back, summarising the keys of a page.

A cache tensor is [P, G, page_size, D] in head-major pages: K and V are two such tensors.
P pages, G KV heads, D head dim, T rows, n gathered positions, E lists, U touched pages.
"""

from __future__ import annotations

import torch
from torch import Tensor


def store_rows(cache: Tensor, rows_TGD: Tensor, locations_T: Tensor) -> None:
    """Write rows at page * page_size + offset, rounding to the cache's dtype. Locations are distinct."""
    page_size = cache.shape[2]
    cache[locations_T // page_size, :, locations_T % page_size] = rows_TGD.to(cache.dtype)


def gather_pages(cache: Tensor, pages_n: Tensor) -> Tensor:
    """Whole pages in the given order: [G, n * page_size, D], in the cache's dtype."""
    num_heads, page_size, dim = cache.shape[1:]
    tile = pages_n * num_heads + torch.arange(num_heads, device=cache.device)[:, None]
    tiles = cache.view(-1, page_size, dim).index_select(0, tile.flatten())
    return tiles.view(num_heads, -1, dim)


def position_rows(pages: Tensor, positions_En: Tensor, heads_E: Tensor, num_heads: int, page_size: int) -> Tensor:
    """Where positions of one request lie in a cache seen as [P * G * page_size, D]: int64 [E, n].

    pages: the request's page table; a position p lies in pages[p // page_size]. List e reads KV head heads_E[e].
    """
    tile_En = pages[positions_En // page_size] * num_heads + heads_E[:, None]
    return tile_En * page_size + positions_En % page_size


def gather_rows(cache: Tensor, rows_En: Tensor) -> Tensor:
    """The D-vectors at `position_rows`: [E, n, D], in the cache's dtype."""
    dim = cache.shape[3]
    return cache.view(-1, dim).index_select(0, rows_En.flatten()).view(*rows_En.shape, dim)


def touched_pages(locations_T: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """The pages that a store touches and how many of their leading offsets are filled after it: int64 [U], [U].

    A request fills a page from offset 0 upwards, so whatever lies behind the last stored offset is of an earlier user.
    """
    pages_U, which_T = torch.unique(locations_T // page_size, return_inverse=True)
    filled_U = torch.zeros_like(pages_U)
    filled_U.scatter_reduce_(0, which_T, locations_T % page_size + 1, "amax")
    return pages_U, filled_U


def key_bounds(keys_UGSD: Tensor, filled_U: Tensor) -> Tensor:
    """Channel-wise bounds over the filled part of each page: [U, G, 2, D], index 0 the maximum, 1 the minimum.

    Equal in dtype to the stored keys, hence exact (QUEST, arXiv 2406.10774, section 3). filled_U >= 1.
    """
    offset = torch.arange(keys_UGSD.shape[2], device=keys_UGSD.device)
    empty = (offset >= filled_U[:, None])[:, None, :, None]
    top = keys_UGSD.masked_fill(empty, -torch.inf).amax(2)
    bottom = keys_UGSD.masked_fill(empty, torch.inf).amin(2)
    return torch.stack((top, bottom), dim=2)


def key_moments(keys_UGSD: Tensor, filled_U: Tensor) -> Tensor:
    """Channel-wise mean and mean squared deviation over the filled part of each page: float32 [U, G, 2, D].

    The deviations are taken from the mean, not the square of the mean from the mean square, which would cancel. Made of
    the stored keys alone, so the same bits whether a page was filled at once or block by block. filled_U >= 1.
    """
    offset = torch.arange(keys_UGSD.shape[2], device=keys_UGSD.device)
    empty = (offset >= filled_U[:, None])[:, None, :, None]
    keys, count = keys_UGSD.float().masked_fill(empty, 0.0), filled_U[:, None, None, None]
    mean = keys.sum(2, keepdim=True) / count
    spread = (keys - mean).square().masked_fill(empty, 0.0).sum(2, keepdim=True) / count
    return torch.cat((mean, spread), dim=2)

"""The memory of the K/V pages: one K and one V tensor per layer, and the summaries that sparse methods declare.

Knows nothing of which page is free or whose it is (`page_pool`), nor how pages are read or written (`attention`).
P pages, G KV heads, D head dim.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from losa_runtime.cache import host_memory
from losa_runtime.cache.page_pool import PageIds

SUMMARY_VECTORS = 2  # D-vectors of a summary per page and KV head


class Summary(Enum):
    """What can be kept per page and KV head beside the keys, SUMMARY_VECTORS vectors each.

    Bounds have the dtype of the keys: the bounds of stored keys are stored keys. Moments are float32 beside keys of any
    dtype. Where a channel's keys lie far from zero and close together, a mean in 16 bits is wrong by more than they
    differ, and with it the variance of every group of pages; in float32 the pages tell a method what their keys would.
    """

    KEY_BOUNDS = "key_bounds"  # channel-wise maximum, then minimum, of the stored keys
    KEY_MOMENTS = "key_moments"  # channel-wise mean, then mean squared deviation from it

    def dtype(self, keys: torch.dtype) -> torch.dtype:
        """Of the summary's numbers, beside keys of that dtype."""
        return torch.float32 if self is Summary.KEY_MOMENTS else keys

    def bytes(self, head_dim: int, keys: torch.dtype) -> int:
        """Per page and KV head."""
        return SUMMARY_VECTORS * head_dim * self.dtype(keys).itemsize


class KVPool:
    """Storage for `num_pages` pages, allocated at once and zeroed, so that nothing undefined is ever read.

    K/V are [P, G, page_size, D] in `dtype`: a view [P * G, 1, page_size, D] makes page lists per KV head ordinary
    page lists.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        summaries: frozenset[Summary] = frozenset(),
    ) -> None:
        assert min(num_layers, num_pages, num_kv_heads, page_size, head_dim) > 0
        self.num_layers, self.num_pages = num_layers, num_pages
        self.num_kv_heads, self.page_size, self.head_dim = num_kv_heads, page_size, head_dim
        self.dtype, self.device, self.summaries = dtype, torch.device(device), summaries
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        self._k = [self._zeros(shape, dtype) for _ in range(num_layers)]
        self._v = [self._zeros(shape, dtype) for _ in range(num_layers)]
        shape = (num_pages, num_kv_heads, SUMMARY_VECTORS, head_dim)
        self._summary = {kind: [self._zeros(shape, kind.dtype(dtype)) for _ in range(num_layers)] for kind in summaries}

    def k(self, layer: int) -> Tensor:
        """Keys of a layer, [P, G, page_size, D]."""
        return self._k[layer]

    def v(self, layer: int) -> Tensor:
        """Values of a layer, [P, G, page_size, D]."""
        return self._v[layer]

    def summary(self, layer: int, kind: Summary) -> Tensor:
        """A declared summary of a layer, [P, G, 2, D]. Meaningful only for pages that hold stored keys."""
        return self._summary[kind][layer]

    def poison(self, pages: PageIds) -> None:
        """Fill pages and their summaries with NaN, so that whoever reads them unwritten shows (for debugging)."""
        index = torch.from_numpy(pages).to(self.device)
        for tensor in (*self._k, *self._v, *(tensor for layers in self._summary.values() for tensor in layers)):
            tensor.index_fill_(0, index, torch.nan)

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.device.type == "cpu":
            return host_memory.zeros(shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    @staticmethod
    def bytes_per_page(
        num_layers: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        summaries: frozenset[Summary] = frozenset(),
    ) -> int:
        """Bytes that one page takes over all layers: K, V and the summaries."""
        rows = 2 * page_size * head_dim * dtype.itemsize
        return num_layers * num_kv_heads * (rows + sum(kind.bytes(head_dim, dtype) for kind in summaries))

    @staticmethod
    def bytes_per_token(
        num_layers: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        summaries: frozenset[Summary] = frozenset(),
    ) -> int:
        """`bytes_per_page` per token, rounded up."""
        page = KVPool.bytes_per_page(num_layers, num_kv_heads, page_size, head_dim, dtype, summaries)
        return -(-page // page_size)

"""The allocator of K/V pages: which page ids are free. Knows nothing of what a page holds or who uses it.

Every page is in exactly one of three hands: free (here), cached (in the radix tree) or owned (by one lease). The sum
is checked by `PrefixCache.check`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PageIds = NDArray[np.int64]


class PagePool:
    """A stack of free page ids. Last freed is first taken, so that warm memory is used again."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 0
        self.num_pages = num_pages
        self._stack: PageIds = np.arange(num_pages - 1, -1, -1, dtype=np.int64)
        self._count = num_pages
        self._is_free = np.ones(num_pages, dtype=bool)

    @property
    def free(self) -> int:
        """Number of free pages."""
        return self._count

    def take(self, count: int) -> PageIds:
        """Remove `count` pages from the free stack. The caller has made sure that there are enough."""
        assert 0 <= count <= self._count, f"take({count}) with {self._count} pages free"
        pages = self._stack[self._count - count : self._count][::-1].copy()
        self._count -= count
        self._is_free[pages] = False
        return pages

    def give(self, pages: PageIds) -> None:
        """Return pages to the free stack. A page that is already free is a bug and named."""
        again = pages[self._is_free[pages]]
        assert again.size == 0, f"pages {again.tolist()} freed twice"
        self._is_free[pages] = True
        self._stack[self._count : self._count + pages.size] = pages
        self._count += int(pages.size)

    def free_pages(self) -> PageIds:
        """The free page ids, in no particular order. For integrity checks."""
        return self._stack[: self._count].copy()

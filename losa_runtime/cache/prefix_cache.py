"""Who holds which page: leases of requests over the pool and the radix tree. Knows no scheduling policy.

A lease is the page table of one request. Its first `shared` pages belong to the tree and are locked; the rest are its
own. `publish` hands finished units to the tree, `close` gives everything back.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from losa_runtime.cache.page_pool import PageIds, PagePool
from losa_runtime.cache.radix import CacheHandle, RadixCache, TokenIds


class Lease:
    """The page table of one request: `pages[:count]` in order of position, of which `shared` are locked in the tree."""

    __slots__ = ("count", "handle", "namespace", "pages", "shared")

    def __init__(self, namespace: str, handle: CacheHandle, capacity: int) -> None:
        self.namespace, self.handle = namespace, handle
        self.pages: PageIds = np.empty(capacity, dtype=np.int64)
        self.shared = self.count = handle.pages.size
        self.pages[: self.count] = handle.pages

    @property
    def table(self) -> PageIds:
        """The pages held, a view."""
        return self.pages[: self.count]


class PrefixCache:
    """The pool and the tree together.

    by_frequency: see RadixCache. reuse=False keeps the leases but shares nothing between requests. on_free: is told of
    pages that come free (for debugging: what they hold must never be read again).
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        block_length: int,
        reuse: bool = True,
        by_frequency: bool = False,
        on_free: Callable[[PageIds], None] | None = None,
    ) -> None:
        assert page_size % block_length == 0 or block_length % page_size == 0
        self.page_size, self.unit, self.reuse = page_size, max(page_size, block_length), reuse
        self.pool = PagePool(num_pages)
        self.tree = RadixCache(self.unit, page_size, by_frequency)
        self._leases: set[Lease] = set()
        self._on_free = on_free
        self.evicted_pages = 0

    @property
    def available(self) -> int:
        """Pages that could be had now: free ones and those that eviction would free."""
        return self.pool.free + self.tree.evictable_pages

    def peek(self, namespace: str, tokens: TokenIds) -> int:
        """Tokens that `open` would find in the cache."""
        return self.tree.peek(namespace, tokens[: tokens.size - tokens.size % self.unit]) if self.reuse else 0

    def open(self, namespace: str, tokens: TokenIds, capacity: int) -> Lease:
        """A lease of at most `capacity` pages that begins with the longest cached prefix of `tokens` (whole units)."""
        usable = tokens[: tokens.size - tokens.size % self.unit] if self.reuse else tokens[:0]
        handle = self.tree.match(namespace, usable)
        self.tree.lock(handle)
        lease = Lease(namespace, handle, capacity)
        self._leases.add(lease)
        return lease

    def count_hit(self, lease: Lease) -> None:
        """The lease's request was let in and will use what it found. One that is closed again never did."""
        self.tree.count_hit(lease.handle)

    def grow(self, lease: Lease, tokens: int) -> bool:
        """Make the lease cover `tokens` positions, evicting if need be. False (and nothing changed) if it cannot."""
        need = -(-tokens // self.page_size) - lease.count
        if need <= 0:
            return True
        if need > self.available:
            return False
        if need > self.pool.free:
            freed = self.tree.evict(need - self.pool.free)
            self.evicted_pages += freed.size
            self._free(freed)
        lease.pages[lease.count : lease.count + need] = self.pool.take(need)
        lease.count += need
        return True

    def publish(self, lease: Lease, tokens: TokenIds) -> None:
        """Share the K/V of `tokens` (all committed) as far as they fill units. Pages that the tree already had for
        the same tokens replace the lease's own, which are freed: equal tokens have equal pages.
        """
        size = tokens.size - tokens.size % self.unit
        count = size // self.page_size
        if not self.reuse or count <= lease.shared:
            return
        handle, present = self.tree.extend(lease.namespace, lease.handle, tokens[:size], lease.pages[:count])
        duplicates = lease.pages[lease.shared : present // self.page_size].copy()
        lease.pages[:count] = handle.pages
        lease.handle, lease.shared = handle, count
        self._free(duplicates)

    def condemn(self, lease: Lease, keep: int) -> None:
        """Take what the lease holds behind its first `keep` tokens out of the tree, whoever stored it: it may be wrong.

        It stays with the lease (and with others that already share it) until it is closed, and is not found again.
        """
        self._free(self.tree.condemn(lease.handle, keep))

    def close(self, lease: Lease) -> None:
        """Give back everything the lease holds. What was published stays in the tree."""
        self._free(lease.pages[lease.shared : lease.count].copy())
        self._free(self.tree.unlock(lease.handle))
        lease.count = lease.shared = 0
        self._leases.remove(lease)

    def flush(self) -> None:
        """Drop every prefix that no lease holds."""
        self._free(self.tree.evict(self.tree.cached_pages))

    def _free(self, pages: PageIds) -> None:
        self.pool.give(pages)
        if self._on_free is not None and pages.size:
            self._on_free(pages)

    @property
    def owned_pages(self) -> int:
        """Pages that belong to leases alone."""
        return sum(lease.count - lease.shared for lease in self._leases)

    def check(self) -> None:
        """Assert that each page is in exactly one hand: free + cached + owned = total. Names the page that is not."""
        seen = np.zeros(self.pool.num_pages, dtype=np.int64)
        cached = evictable = 0
        for node in self.tree.nodes():
            seen[node.pages] += 1
            assert node.tokens.size == node.pages.size * self.page_size and node.tokens.size % self.unit == 0
            cached += node.pages.size
            evictable += node.pages.size if node.locks == 0 else 0
            assert node.parent is not None and node.locks <= max(node.parent.locks, len(self._leases))
        np.add.at(seen, self.pool.free_pages(), 1)
        for lease in self._leases:
            np.add.at(seen, lease.pages[lease.shared : lease.count], 1)
            assert np.array_equal(lease.pages[: lease.shared], _path_pages(lease.handle)), (
                "a lease lost its shared pages"
            )
        wrong = np.flatnonzero(seen != 1)
        assert wrong.size == 0, f"page {wrong[0]} is in {seen[wrong[0]]} hands ({wrong.size} such pages)"
        assert cached == self.tree.cached_pages and evictable == self.tree.evictable_pages


def _path_pages(handle: CacheHandle) -> PageIds:
    parts = [node.pages for node in RadixCache._path(handle.node)]
    return np.concatenate(parts[::-1]) if parts else np.empty(0, dtype=np.int64)

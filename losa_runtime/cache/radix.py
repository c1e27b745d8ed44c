"""A radix tree from token sequences to K/V pages, in whole units. Knows no request and no allocator.

A token's K/V depends on its whole diffusion block, so everything here - match, split, insert, evict - happens in
units of max(page_size, block_length) tokens, anchored at position 0. The tree owns the pages in its nodes until it
gives them back: from `evict`, or, if they were condemned, as soon as nobody holds them. Locks run from a node to the
root: a locked path is never evicted.
Token comparison is numpy on whole edges and child lookup is by the bytes of the first unit: no walk over tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from losa_runtime.cache.page_pool import PageIds

TokenIds = NDArray[np.int32]
_NO_TOKENS: TokenIds = np.empty(0, dtype=np.int32)
_NO_PAGES: PageIds = np.empty(0, dtype=np.int64)


class Node:
    """An edge and its end: `tokens` (a multiple of the unit) and the pages that hold their K/V.

    condemned: out of the tree, like everything below; lives until its last lock goes.
    """

    __slots__ = (
        "children",
        "condemned",
        "hits",
        "last_used",
        "locks",
        "namespace",
        "offered",
        "pages",
        "parent",
        "tokens",
    )

    def __init__(self, parent: Node | None, tokens: TokenIds, pages: PageIds, last_used: int) -> None:
        self.parent, self.tokens, self.pages, self.last_used = parent, tokens, pages, last_used
        self.children: dict[bytes, Node] = {}
        self.locks = self.hits = 0
        self.namespace = ""  # of a root
        self.condemned: bool = parent is not None and parent.condemned
        self.offered = False  # has an entry in the tree's heap of eviction candidates


class CacheHandle(NamedTuple):
    """A matched path. Valid until the next call that may evict, unless locked. pages: of the whole path, in order."""

    node: Node
    tokens: int
    pages: PageIds


class RadixCache:
    """Prefix tree with reference locks and eviction of unlocked leaves.

    by_frequency: evict the leaf with the fewest hits (the older of equals) instead of the least recently used one.
    unit: tokens per unit, a multiple of page_size and of the block length. One root per namespace: requests of
    different namespaces can neither share nor probe each other's prefixes.
    """

    def __init__(self, unit: int, page_size: int, by_frequency: bool = False) -> None:
        assert unit % page_size == 0
        self.unit, self.page_size, self.by_frequency = unit, page_size, by_frequency
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self._candidates: list[tuple[int, int, int, Node]] = []  # lazy heap of (*rank, tie, leaf)
        self._tie = 0
        self._condemned: set[Node] = set()  # the topmost ones; their parents do not know them any more
        self.cached_pages = 0  # pages in the tree and in condemned nodes
        self.evictable_pages = 0  # of those, on no locked path

    def match(self, namespace: str, tokens: TokenIds) -> CacheHandle:
        """The longest cached prefix of `tokens` in whole units; splits a node where the match ends inside it."""
        self._clock += 1
        root = self._roots.get(namespace) or Node(None, _NO_TOKENS, _NO_PAGES, self._clock)
        return self._walk(CacheHandle(root, 0, _NO_PAGES), tokens)

    def count_hit(self, handle: CacheHandle) -> None:
        """A request will use the path of `handle`: what eviction by frequency goes by."""
        for node in self._path(handle.node):
            node.hits += 1

    def peek(self, namespace: str, tokens: TokenIds) -> int:
        """How many tokens `match` would find; changes nothing."""
        node, done = self._roots.get(namespace), 0
        while node is not None and done < tokens.size:
            child = node.children.get(self._key(tokens, done))
            if child is None:
                break
            common = self._common(child.tokens, tokens[done:])
            done += common
            node = child if common == child.tokens.size else None
        return done

    def extend(self, namespace: str, handle: CacheHandle, tokens: TokenIds, pages: PageIds) -> tuple[CacheHandle, int]:
        """Store a prefix (whole units) whose first `handle.tokens` are the locked path of `handle`.

        Returns the handle of the whole prefix, locked in place of `handle`, and the number of tokens that were there
        already. The tree takes over the pages behind those; the earlier ones stay the caller's. Costs as much as what
        is new: a leaf that this lock alone holds grows, so that a long output does not become a long chain.
        """
        assert tokens.size % self.unit == 0 and pages.size * self.page_size == tokens.size
        self._clock += 1
        start = handle
        if handle.tokens == 0:
            root = self._roots.setdefault(namespace, Node(None, _NO_TOKENS, _NO_PAGES, self._clock))
            root.namespace = namespace
            start = CacheHandle(root, 0, _NO_PAGES)
        found = self._walk(start, tokens)
        node, present = found.node, found.tokens
        fresh = pages[present // self.page_size :].copy()
        if fresh.size:
            node = self._append(node, start.node, tokens[present:], fresh)
        for new in self._path(node):
            if new is start.node:
                break
            self._lock_node(new)
        return CacheHandle(node, tokens.size, np.concatenate([found.pages, fresh])), present

    def lock(self, handle: CacheHandle) -> None:
        """Protect the path of `handle` from eviction. Counted: each lock needs its own unlock."""
        for node in self._path(handle.node):
            self._lock_node(node)

    def unlock(self, handle: CacheHandle) -> PageIds:
        """Undo one `lock`. Returns the pages of condemned nodes that nobody holds any more."""
        freed: list[PageIds] = []
        for node in list(self._path(handle.node)):
            assert node.locks > 0, "unlock without lock"
            node.locks -= 1
            if node.locks == 0 and node.condemned:
                freed.append(self._drop(node))
            elif node.locks == 0:
                self.evictable_pages += node.pages.size
                self._offer(node)
        return np.concatenate(freed) if freed else _NO_PAGES

    def condemn(self, handle: CacheHandle, keep: int) -> PageIds:
        """Take what lies behind the first `keep` tokens of a locked path out of the tree, with all that follows it.

        Nobody will find it again; who holds a lock on part of it keeps that part until `unlock`. Returns the pages
        that nobody holds.
        """
        assert keep % self.unit == 0
        top, end = None, 0
        for node in reversed(list(self._path(handle.node))):
            end += node.tokens.size
            if end > keep:
                top = node
                break
        if top is None or top.condemned:
            return _NO_PAGES
        if end - top.tokens.size < keep:
            self._split(top, keep - (end - top.tokens.size))  # `top` goes on as the lower part
        parent = top.parent
        assert parent is not None and top.locks > 0
        del parent.children[self._key(top.tokens, 0)]
        if parent.parent is None and not parent.children:
            self._roots.pop(parent.namespace, None)
        self._condemned.add(top)
        return self._condemn_below(top)

    def _condemn_below(self, top: Node) -> PageIds:
        """Mark a subtree; the pages of those of its nodes that nobody holds, which are dropped."""
        freed: list[PageIds] = []
        stack = [top]
        while stack:
            node = stack.pop()
            node.condemned = True
            stack.extend(node.children.values())
            if node.locks == 0:
                self.evictable_pages -= node.pages.size
                freed.append(self._drop(node))
        return np.concatenate(freed) if freed else _NO_PAGES

    def _drop(self, node: Node) -> PageIds:
        """Let a condemned node without locks go."""
        if node in self._condemned:
            self._condemned.remove(node)
        else:
            assert node.parent is not None
            del node.parent.children[self._key(node.tokens, 0)]
        node.parent = None
        self.cached_pages -= node.pages.size
        return node.pages

    def evict(self, count: int) -> PageIds:
        """Drop unlocked leaves, oldest first, until at least `count` pages came free or none is left."""
        freed: list[PageIds] = []
        total = 0
        while total < count and self._candidates:
            *rank, _, node = heapq.heappop(self._candidates)
            node.offered = False
            if not self._evictable(node):
                continue
            if tuple(rank) != self._rank(node):  # touched since it was offered
                self._offer(node)
                continue
            self._keep_head(node, count - total)
            parent = node.parent
            assert parent is not None
            del parent.children[self._key(node.tokens, 0)]
            node.parent = None
            freed.append(node.pages)
            total += node.pages.size
            if parent.parent is not None:
                self._offer(parent)
            elif not parent.children:  # the namespace holds nothing any more
                del self._roots[parent.namespace]
        self.cached_pages -= total
        self.evictable_pages -= total
        return np.concatenate(freed) if freed else _NO_PAGES

    def nodes(self) -> Iterator[Node]:
        """Every node with pages, condemned ones too. For integrity checks and statistics."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        stack += self._condemned
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _walk(self, start: CacheHandle, tokens: TokenIds) -> CacheHandle:
        """Follow `tokens` from a known path on, as far as they are cached."""
        node, done, pages = start.node, start.tokens, [start.pages]
        while done < tokens.size:
            child = node.children.get(self._key(tokens, done))
            if child is None:
                break
            common = self._common(child.tokens, tokens[done:])
            if common < child.tokens.size:
                child = self._split(child, common)
            child.last_used = self._clock
            pages.append(child.pages)
            done += common
            node = child
        return CacheHandle(node, done, np.concatenate(pages))

    def _append(self, node: Node, held: Node, tokens: TokenIds, fresh: PageIds) -> Node:
        """Put new tokens behind `node`: into it, if it is the leaf `held` that one lock alone holds, or as a child."""
        self.cached_pages += fresh.size
        if node is held and node.parent is not None and node.locks == 1 and not node.children:
            node.tokens, node.pages = np.concatenate([node.tokens, tokens]), np.concatenate([node.pages, fresh])
            return node
        leaf = Node(node, tokens.copy(), fresh, self._clock)
        node.children[self._key(tokens, 0)] = leaf
        self.evictable_pages += fresh.size
        return leaf

    def _lock_node(self, node: Node) -> None:
        if node.locks == 0:
            self.evictable_pages -= node.pages.size
        node.locks += 1

    def _keep_head(self, node: Node, wanted: int) -> None:
        """Cut a leaf that has more pages than wanted, so that only its tail goes."""
        pages_per_unit = self.unit // self.page_size
        keep = (node.pages.size - wanted) // pages_per_unit * self.unit
        if keep > 0:
            self._split(node, keep)

    def _key(self, tokens: TokenIds, at: int) -> bytes:
        return tokens[at : at + self.unit].tobytes()

    def _common(self, edge: TokenIds, rest: TokenIds) -> int:
        """Length of the common prefix in whole units."""
        size = min(edge.size, rest.size)
        differs = edge[:size] != rest[:size]
        at = int(differs.argmax()) if differs.any() else size
        return at - at % self.unit

    def _split(self, node: Node, at: int) -> Node:
        """Cut `node` after `at` tokens; returns the new upper part, which inherits the locks."""
        parent = node.parent
        assert parent is not None and 0 < at < node.tokens.size
        cut = at // self.page_size
        upper = Node(parent, node.tokens[:at], node.pages[:cut], node.last_used)
        upper.locks, upper.hits = node.locks, node.hits
        parent.children[self._key(upper.tokens, 0)] = upper
        node.parent, node.tokens, node.pages = upper, node.tokens[at:], node.pages[cut:]
        upper.children[self._key(node.tokens, 0)] = node
        return upper

    def _evictable(self, node: Node) -> bool:
        return node.parent is not None and node.locks == 0 and not node.children

    def _offer(self, node: Node) -> None:
        if not node.offered and self._evictable(node):
            node.offered = True
            self._tie += 1
            heapq.heappush(self._candidates, (*self._rank(node), self._tie, node))

    def _rank(self, node: Node) -> tuple[int, int]:
        """Leaves of the lowest rank are evicted first."""
        return (node.hits if self.by_frequency else 0), node.last_used

    @staticmethod
    def _path(node: Node | None) -> Iterator[Node]:
        while node is not None and node.parent is not None:
            yield node
            node = node.parent

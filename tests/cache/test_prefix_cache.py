"""Leases, tree and pool: against a plain model of what must be cached, and under random sharing and pressure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from losa_runtime.cache.page_pool import PagePool
from losa_runtime.cache.prefix_cache import Lease, PrefixCache
from tests.scheduler.stub import World


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def fill(cache: PrefixCache, tokens: np.ndarray, namespace: str = "") -> Lease:
    lease = cache.open(namespace, tokens, capacity=64)
    assert cache.grow(lease, tokens.size)
    cache.publish(lease, tokens)
    return lease


def test_pool_takes_and_gives_each_page_once() -> None:
    pool = PagePool(4)
    first = pool.take(3)
    assert pool.free == 1
    pool.give(first[:2])
    assert pool.free == 3
    with pytest.raises(AssertionError, match=str(int(first[0]))):
        pool.give(first[:1])


def test_a_prefix_is_found_in_whole_units_only() -> None:
    cache = PrefixCache(16, page_size=4, block_length=4)
    cache.close(fill(cache, ids(*range(12))))
    diverging = cache.open("", ids(0, 1, 2, 3, 4, 5, 6, 99, 8, 9, 10, 11), 16)
    assert diverging.count * 4 == 4
    cache.close(diverging)
    cache.check()
    for length, hit in [(12, 12), (11, 8), (8, 8), (7, 4), (3, 0), (0, 0)]:
        lease = cache.open("", ids(*range(length)), 16)
        assert lease.count * 4 == hit, length
        cache.close(lease)
    cache.check()


def test_small_blocks_share_a_page_only_when_it_is_full() -> None:
    cache = PrefixCache(16, page_size=16, block_length=4)
    lease = cache.open("", ids(*range(12)), 4)
    assert cache.grow(lease, 12)
    cache.publish(lease, ids(*range(12)))
    assert lease.shared == 0
    cache.publish(lease, ids(*range(16)))
    assert lease.shared == 1
    cache.close(lease)
    cache.check()


def test_blocks_larger_than_a_page_are_the_unit() -> None:
    cache = PrefixCache(16, page_size=4, block_length=8)
    cache.close(fill(cache, ids(*range(16))))
    lease = cache.open("", ids(*range(12)), 16)
    assert lease.count == 2
    cache.close(lease)


def test_namespaces_do_not_see_each_other() -> None:
    cache = PrefixCache(16, page_size=4, block_length=4)
    cache.close(fill(cache, ids(*range(8)), "tenant-a"))
    assert (cache.peek("tenant-a", ids(*range(8))), cache.peek("tenant-b", ids(*range(8)))) == (8, 0)
    lease = cache.open("tenant-b", ids(*range(8)), 16)
    assert lease.count == 0
    cache.close(lease)


def test_duplicate_pages_are_freed_and_replaced() -> None:
    cache = PrefixCache(16, page_size=4, block_length=4)
    first = cache.open("", ids(*range(8)), 16)
    second = cache.open("", ids(*range(8)), 16)
    assert cache.grow(first, 8) and cache.grow(second, 8)
    cache.publish(first, ids(*range(8)))
    cache.publish(second, ids(*range(8)))
    assert np.array_equal(first.table, second.table)
    assert cache.pool.free == 14
    cache.check()


def test_eviction_takes_the_oldest_unlocked_leaf_and_spares_locked_paths() -> None:
    cache = PrefixCache(4, page_size=4, block_length=4)
    kept = fill(cache, ids(1, 1, 1, 1))
    used = fill(cache, ids(3, 3, 3, 3))
    old = fill(cache, ids(2, 2, 2, 2))
    cache.close(used)
    cache.close(old)
    cache.close(cache.open("", ids(3, 3, 3, 3), 4))
    lease = cache.open("", ids(), 4)
    assert cache.grow(lease, 8)  # one page is free, one must be evicted: the older of the two unlocked
    cache.check()
    assert cache.open("", ids(2, 2, 2, 2), 4).count == 0
    assert cache.open("", ids(3, 3, 3, 3), 4).count == 1
    assert not cache.grow(lease, 16), "the locked page and the one just locked must stay"
    assert kept.count == 1


def test_eviction_by_frequency_keeps_what_is_used_often() -> None:
    cache = PrefixCache(3, page_size=4, block_length=4, by_frequency=True)
    often, once = fill(cache, ids(1, 1, 1, 1)), fill(cache, ids(2, 2, 2, 2))
    cache.close(often)
    for tokens in [ids(1, 1, 1, 1)] * 3 + [ids(2, 2, 2, 2)]:  # the second is used more recently, but once
        lease = cache.open("", tokens, 4)
        cache.count_hit(lease)
        cache.close(lease)
    cache.close(once)
    lease = cache.open("", ids(), 4)
    assert cache.grow(lease, 8)
    assert cache.peek("", ids(1, 1, 1, 1)) == 4 and cache.peek("", ids(2, 2, 2, 2)) == 0


def test_waiting_for_room_does_not_count_as_use() -> None:
    world = World(pages=8, running=2)
    world.add("a", list(range(8)), 20)
    world.step()
    before = {id(n): n.hits for n in world.cache.tree.nodes()}
    world.add("waits", [*range(8), *range(50, 74)], 1)
    for _ in range(4):
        world.step()
    assert all(n.hits == before.get(id(n), 0) for n in world.cache.tree.nodes())


def test_only_as_much_is_evicted_as_is_needed() -> None:
    cache = PrefixCache(10, page_size=4, block_length=4)
    cache.close(fill(cache, ids(*range(36))))
    lease = cache.open("", ids(), 4)
    assert cache.grow(lease, 8)
    assert cache.peek("", ids(*range(36))) == 32
    cache.check()


def test_a_namespace_without_pages_leaves_nothing_behind() -> None:
    cache = PrefixCache(10, page_size=4, block_length=4)
    for i in range(50):
        cache.close(cache.open(f"tenant-{i}", ids(1, 2, 3, 4), 4))
    cache.close(fill(cache, ids(1, 2, 3, 4), "stays"))
    assert list(cache.tree._roots) == ["stays"]
    cache.flush()
    assert not cache.tree._roots


def test_a_long_output_stays_one_edge() -> None:
    cache = PrefixCache(64, page_size=4, block_length=4)
    tokens = ids(*range(200))
    lease = cache.open("", tokens[:8], 64)
    for end in range(8, 201, 4):
        assert cache.grow(lease, end)
        cache.publish(lease, tokens[:end])
    assert sum(1 for _ in cache.tree.nodes()) == 1
    other = cache.open("", tokens[:100], 64)  # cuts the edge that the first lease still extends
    assert other.count == 25
    cache.check()
    cache.close(lease)
    cache.close(other)
    cache.check()


def test_peek_says_what_match_finds_and_changes_nothing() -> None:
    cache = PrefixCache(16, page_size=4, block_length=4)
    cache.close(fill(cache, ids(*range(12))))
    for tokens in (ids(*range(12)), ids(*range(10)), ids(*range(4), 9, 9, 9, 9), ids(9)):
        nodes = sum(1 for _ in cache.tree.nodes())
        peeked = cache.peek("", tokens)
        assert sum(1 for _ in cache.tree.nodes()) == nodes
        lease = cache.open("", tokens, 16)
        assert lease.count * 4 == peeked
        cache.close(lease)


def test_what_is_condemned_is_not_found_again_and_goes_with_its_last_holder() -> None:
    cache = PrefixCache(16, page_size=4, block_length=4)
    cache.close(fill(cache, ids(*range(4))))  # was there before
    bad = fill(cache, ids(*range(16)))
    sharer = fill(cache, ids(*range(8), 50, 50, 50, 50))
    cache.close(fill(cache, ids(*range(12), 60, 60, 60, 60)))  # nobody holds it any more
    assert cache.pool.free == 16 - 6
    cache.condemn(bad, keep=4)
    cache.check()
    assert cache.pool.free == 16 - 5, "what nobody holds is free at once"
    assert cache.peek("", ids(*range(16))) == 4
    cache.condemn(bad, keep=4)  # again: nothing
    again = fill(cache, ids(*range(12)))  # the same tokens, stored afresh
    assert set(again.table[1:]).isdisjoint({*bad.table, *sharer.table})
    assert cache.grow(sharer, 16)
    cache.publish(sharer, ids(*range(8), 50, 50, 50, 50, 1, 1, 1, 1))  # goes on, for itself
    cache.check()
    for lease, free in [(bad, 10), (sharer, 13), (again, 13)]:
        cache.close(lease)
        cache.check()
        assert cache.pool.free == free
    assert cache.peek("", ids(*range(16))) == 12
    assert cache.peek("", ids(*range(8), 50, 50, 50, 50)) == 8
    cache.flush()
    assert cache.pool.free == 16


@pytest.mark.parametrize("first", [0, 1])
def test_what_grows_on_condemned_pages_goes_with_them(first: int) -> None:
    cache = PrefixCache(16, page_size=4, block_length=4)
    leases = [fill(cache, ids(*range(8))) for _ in range(2)]
    cache.condemn(leases[0], keep=0)
    assert cache.grow(leases[0], 16)
    cache.publish(leases[0], ids(*range(16)))  # behind the part that both hold
    assert cache.grow(leases[1], 12)
    cache.publish(leases[1], ids(*range(12)))  # cuts what the first one added
    assert np.array_equal(leases[0].table[:3], leases[1].table)
    cache.check()
    for lease in (leases[first], leases[1 - first]):
        cache.close(lease)
        cache.check()
    assert cache.pool.free == 16


def test_a_whole_namespace_can_be_condemned() -> None:
    cache = PrefixCache(16, page_size=4, block_length=4)
    bad = fill(cache, ids(*range(8)), "b")
    cache.condemn(bad, keep=0)
    other = fill(cache, ids(*range(8)), "b")
    cache.close(bad)
    cache.close(other)
    cache.check()
    assert cache.peek("b", ids(*range(8))) == 8
    cache.flush()
    assert not cache.tree._roots and cache.pool.free == 16


def test_freed_pages_are_reported() -> None:
    freed: list[int] = []
    cache = PrefixCache(4, page_size=4, block_length=4, on_free=lambda pages: freed.extend(pages.tolist()))
    lease = fill(cache, ids(*range(8)))
    held = lease.table.tolist()
    cache.close(lease)
    assert freed == []
    cache.flush()
    assert sorted(freed) == sorted(held)


def test_without_reuse_nothing_is_shared() -> None:
    cache = PrefixCache(8, page_size=4, block_length=4, reuse=False)
    cache.close(fill(cache, ids(*range(8))))
    lease = cache.open("", ids(*range(8)), 8)
    assert lease.count == 0
    assert cache.pool.free == 8


# Few different units that differ in their last token: prefixes are shared often, and part inside a unit.
SHARED = st.lists(st.sampled_from([(0, 0, 0, 0), (0, 0, 0, 1), (0, 1, 0, 0)]), max_size=6).map(
    lambda units: [token for unit in units for token in unit]
)


class PrefixCacheMachine(RuleBasedStateMachine):
    """Random requests over a tiny alphabet (much sharing, many splits) on a small pool (much eviction).

    The model keeps, per page, the exact prefix whose K/V the page holds: a lease must only ever list pages whose
    content is its own prefix.
    """

    @initialize(page_and_block=st.sampled_from([(1, 1), (2, 2), (4, 2), (2, 4)]), pages=st.integers(6, 24))
    def start(self, page_and_block: tuple[int, int], pages: int) -> None:
        self.page, self.block = page_and_block
        self.cache = PrefixCache(pages, self.page, self.block)
        self.live: list[tuple[Lease, str, np.ndarray, int]] = []
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.condemned: set[int] = set()

    def write(self, lease: Lease, namespace: str, tokens: np.ndarray, start: int, stop: int) -> None:
        for page in range(start // self.page, -(-stop // self.page)):
            held = tuple(int(t) for t in tokens[: min((page + 1) * self.page, stop)])
            self.content[int(lease.pages[page])] = (namespace, held)

    @rule(
        tokens=SHARED,
        namespace=st.sampled_from(["", "", "", "b"]),
    )
    def open(self, tokens: list[int], namespace: str) -> None:
        array = np.array(tokens[: len(tokens) - len(tokens) % self.block], dtype=np.int32)
        lease = self.cache.open(namespace, array, capacity=64)
        hit = lease.count * self.page
        assert hit <= array.size and hit % self.cache.unit == 0
        assert self.condemned.isdisjoint(lease.table.tolist())
        self.live.append((lease, namespace, array, hit))

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99), more=st.lists(st.integers(0, 1), min_size=4, max_size=4), blocks=st.integers(1, 3))
    def extend(self, pick: int, more: list[int], blocks: int) -> None:
        """Store the next blocks (known ones first, then generated ones) and publish them."""
        at = pick % len(self.live)
        lease, namespace, tokens, committed = self.live[at]
        stop = committed + blocks * self.block
        if stop > 40:
            return
        if stop > tokens.size:
            tokens = np.concatenate([tokens, np.resize(np.array(more, dtype=np.int32), stop - tokens.size)])
        before = self.cache.available
        if not self.cache.grow(lease, stop):
            assert -(-stop // self.page) - lease.count > before
            return
        self.write(lease, namespace, tokens, committed, stop)
        self.cache.publish(lease, tokens[:stop])
        self.live[at] = (lease, namespace, tokens, stop)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99))
    def close(self, pick: int) -> None:
        lease = self.live.pop(pick % len(self.live))[0]
        self.cache.close(lease)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99), keep=st.integers(0, 8))
    def condemn(self, pick: int, keep: int) -> None:
        lease = self.live[pick % len(self.live)][0]
        units = lease.shared * self.page // self.cache.unit
        keep = min(keep, units) * self.cache.unit
        self.condemned.update(lease.pages[keep // self.page : lease.shared].tolist())
        self.cache.condemn(lease, keep)

    @invariant()
    def condemned_pages_leave_with_their_last_holder(self) -> None:
        free = set(self.cache.pool.free_pages().tolist())
        held = {page for lease, *_ in self.live for page in lease.table.tolist()}
        self.condemned -= free
        assert self.condemned <= held

    @rule()
    def flush(self) -> None:
        self.cache.flush()
        if not self.live:
            assert self.cache.pool.free == self.cache.pool.num_pages

    @invariant()
    def every_page_is_in_one_hand(self) -> None:
        self.cache.check()

    @invariant()
    def leases_list_their_own_prefix(self) -> None:
        for lease, namespace, tokens, committed in self.live:
            for page in range(-(-committed // self.page)):
                stop = min((page + 1) * self.page, committed)
                owner, held = self.content[int(lease.pages[page])]
                assert (owner, held[:stop]) == (namespace, tuple(int(t) for t in tokens[:stop]))


TestPrefixCacheMachine = PrefixCacheMachine.TestCase
TestPrefixCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.slow
class TestPrefixCacheMachineLong(PrefixCacheMachine.TestCase):
    """The same for at least 10,000 steps."""

    settings = settings(max_examples=400, stateful_step_count=60, deadline=None)

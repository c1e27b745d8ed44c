"""Models whose position i is predicted at i - 1: a block's first token comes with what stores the block before it."""

from __future__ import annotations

import pytest

from losa_runtime.core.batch import ForwardMode
from tests.scheduler.stub import World
from tests.scheduler.test_scheduler import expected


def test_commits_are_not_fused_and_bring_the_next_first_token() -> None:
    world = World(pages=32, shifted=True)
    world.add("r", list(range(4)), 12)
    world.drain()
    modes = [[item.mode for item in work.items] for work in world.rounds if work.items]
    assert all(len(each) == 1 for each in modes), "a commit and the next opening in one forward"
    stores = [item for work in world.rounds for item in work.items if item.mode.stores]
    assert [(item.mode, item.start, item.candidates is not None) for item in stores] == [
        (ForwardMode.PREFILL, 0, True),
        (ForwardMode.COMMIT, 4, True),
        (ForwardMode.COMMIT, 8, True),
    ]
    assert world.tokens("r") == expected(4, 12)


def test_a_prompt_that_ends_inside_a_block_asks_for_nothing_at_prefill() -> None:
    world = World(pages=32, shifted=True)
    world.add("r", list(range(6)), 1)
    world.drain()
    assert [item.candidates for work in world.rounds for item in work.items if item.mode.stores] == [None]


def test_a_hit_of_the_whole_prompt_computes_its_last_block_again() -> None:
    world = World(pages=32, shifted=True)
    for rid in "ab":
        world.add(rid, list(range(12)), 5)
        world.drain()
    assert [world.terminal(rid)[0].cached_tokens for rid in "ab"] == [0, 8]
    again = [i for work in world.rounds for i in work.items if i.mode is ForwardMode.PREFILL][1:]
    assert [(i.start, i.tokens.tolist()) for i in again] == [(8, [8, 9, 10, 11])]
    assert world.tokens("a") == world.tokens("b") == expected(12, 5)
    assert world.cache.tree.cached_pages == 4, "the block that was computed again is in the cache once"


@pytest.mark.parametrize(("new", "score", "cached"), [(0, None, 12), (0, 3, 12), (4, 3, 8)])
def test_what_generates_nothing_uses_the_whole_hit(new: int, score: int | None, cached: int) -> None:
    world = World(pages=32, shifted=True)
    world.add("a", list(range(12)), 1)
    world.drain()
    world.add("b", list(range(12)), new, score=score)
    world.drain()
    [end] = world.terminal("b")
    assert end.cached_tokens == cached
    if score is not None:
        assert len(end.prompt_logprobs or ()) == 9
    assert world.tokens("b") == expected(12, new)


def test_a_first_token_that_stops_ends_the_request_but_not_before_its_scores() -> None:
    stop = expected(8, 1)[0]
    world = World(pages=32, shifted=True)
    world.add("r", list(range(8)), 9, stop=(stop,))
    world.add("s", list(range(20, 28)), 9, stop=(stop,), score=2)
    world.drain()
    for rid in "rs":
        [end] = world.terminal(rid)
        assert end.finish is not None and (end.finish.type, end.finish.matched) == ("stop", stop)
        assert world.tokens(rid) == [stop]
    assert len(world.terminal("s")[0].prompt_logprobs or ()) == 6
    assert not any(item.mode is ForwardMode.OPEN for work in world.rounds for item in work.items)


def test_a_scored_first_position_is_asked_of_the_block_before() -> None:
    world = World(pages=32, shifted=True)
    world.add("r", list(range(9)), 0, score=3)
    world.drain()
    asked = {
        (item.start, int(item.candidates[0])): item.tokens.tolist()
        for work in world.rounds
        for item in work.items
        if item.mode is ForwardMode.SCORE and item.candidates is not None
    }
    assert sorted(asked) == [(0, 3), (0, 4), (4, 1), (4, 2), (4, 3), (4, 4)]
    assert asked[0, 4] == [0, 1, 2, 3] and asked[4, 4] == [4, 5, 6, 7] and asked[4, 1][1:] == [999] * 3


def test_retraction_and_failure_find_the_first_token_again() -> None:
    world = World(pages=8, running=4, shifted=True)
    for i, rid in enumerate("abc"):
        world.add(rid, [i * 10 + j for j in range(4)], 17)
    for _ in range(4):
        world.step()
    world.raising = 1
    world.drain()
    assert sum(world.terminal(r)[0].stats.retractions for r in "abc") > 0
    assert all(world.tokens(r) == expected(4, 17) for r in "abc")


def test_blocks_of_one_need_no_step() -> None:
    world = World(pages=32, block=1, page=1, shifted=True)
    world.add("r", [1, 2, 3], 6)
    world.drain()
    assert world.tokens("r") == expected(3, 6)
    assert not any(item.mode is ForwardMode.OPEN for work in world.rounds for item in work.items)

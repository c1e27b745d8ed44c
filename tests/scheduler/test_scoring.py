"""Scoring shares the rounds: with generations, which go on, and among requests, of which none waits for a long one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa_runtime.core.batch import ForwardMode
from losa_runtime.scheduler import scoring
from losa_runtime.scheduler.scoring import positions_of_round, shares
from tests.scheduler.stub import World

DENOISING = (ForwardMode.OPEN, ForwardMode.DENOISE)


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 200))
def test_shares_are_even_and_waste_nothing(wanted: list[int], total: int) -> None:
    given = shares(wanted, total)
    assert all(0 <= count <= want for count, want in zip(given, wanted, strict=True))
    assert sum(given) == min(total, sum(wanted))
    hungry = [count for count, want in zip(given, wanted, strict=True) if count < want]
    # Who got less than it wanted got as much as anybody else, but for what cannot be divided.
    assert all(count >= max(given) - 1 for count in hungry)


def test_beside_others_scoring_gets_half_and_reads_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert positions_of_round([1000], [0], 64, 4, alone=True) == [16]
    assert positions_of_round([1000], [0], 64, 4, alone=False) == [8]
    assert positions_of_round([1000, 3], [0, 0], 64, 4, alone=False) == [5, 3]
    assert positions_of_round([1000], [0], 4, 4, alone=False) == [1]
    assert positions_of_round([], [], 64, 4, alone=True) == []
    monkeypatch.setattr(scoring, "MAX_READS", 1000)
    assert positions_of_round([1000], [200], 64, 4, alone=False) == [5]
    assert positions_of_round([1000], [5000], 64, 4, alone=False) == [1]
    assert positions_of_round([1000, 1000], [200, 100], 64, 4, alone=False) == [2, 4]


def test_a_generation_goes_on_in_every_round_beside_a_long_scoring() -> None:
    world = World(pages=512, budget=64)
    world.add("select", list(range(900)), 0, score=0)
    while not world.scheduler.running or world.scheduler.running[0].prefilling:
        world.step()
    world.add("talk", [7] * 4, 40)
    while not world.terminal("talk"):
        work = world.step()
        modes = [item.mode for item in work.items]
        assert sum(item.tokens.size for item in work.items if item.mode is ForwardMode.SCORE) <= 32
        assert not world.terminal("select")
        if ForwardMode.PREFILL not in modes and not world.terminal("talk"):
            assert any(mode in DENOISING for mode in modes)
    world.drain()
    assert len(world.terminal("select")[0].prompt_logprobs or ()) == 900


def test_a_short_scoring_does_not_wait_for_a_long_one() -> None:
    world = World(pages=512, budget=64)
    world.add("long", list(range(900)), 0, score=0)
    while not world.scheduler.running or world.scheduler.running[0].prefilling:
        world.step()
    world.add("short", [7] * 12, 0, score=0)
    rounds = 0
    while not world.terminal("short"):
        world.step()
        rounds += 1
    assert rounds <= 5
    assert not world.terminal("long")
    world.drain()

"""When an engine counts as gone: silence, stalled work, restarts, and a full queue. Pure rules, no process."""

from __future__ import annotations

import pytest

from losa_server.pulse import WorkClock
from losa_server.queue_view import QueueView
from losa_server.supervisor import PAUSE_S, WINDOW_S, RestartBudget
from losa_server.vigil import Vigil


def test_silence_counts_once_it_has_loaded() -> None:
    vigil = Vigil(silence_s=4, stall_s=300)
    assert vigil.passed(299) is None, "loading may hold up heartbeats"
    vigil.ready()
    assert vigil.passed(3.9) is None
    vigil.heard()
    assert vigil.passed(3.9) is None
    assert vigil.passed(0.2) == "the engine process has been silent for 4 s"


@pytest.mark.parametrize("stall_s", [1.5, 300])
def test_a_process_that_never_says_anything_while_loading(stall_s: float) -> None:
    """How long a forward may take says nothing of how long imports may."""
    assert "silent for 300 s" in (Vigil(silence_s=1, stall_s=stall_s).passed(301) or "")
    assert Vigil(silence_s=1, stall_s=stall_s).passed(299) is None


def test_work_that_does_not_move_on() -> None:
    vigil = Vigil(silence_s=4, stall_s=300)
    vigil.ready()
    vigil.heard(stalled_s=299)
    assert vigil.passed(0.2) is None
    vigil.heard(stalled_s=0)
    vigil.heard()
    assert vigil.passed(0.2) is None
    vigil.heard(stalled_s=301)
    assert "300 s without finishing a forward" in (vigil.passed(0.2) or "")


def test_the_clock_runs_while_there_is_work_and_no_progress() -> None:
    now = [100.0]
    clock = WorkClock(lambda: now[0])
    assert clock.stalled_s == 0
    clock.note(True, 5)
    now[0] += 3
    assert clock.stalled_s == 3
    clock.note(True, 5)
    now[0] += 3
    assert clock.stalled_s == 6, "a step that brought nothing is no progress"
    clock.note(True, 6)
    assert clock.stalled_s == 0
    now[0] += 3
    clock.note(False, 6)
    now[0] += 3
    assert clock.stalled_s == 0, "there is no work"
    clock.note(True, 6)
    now[0] += 1
    assert clock.stalled_s == 1, "it counts from the arrival of work"


def test_a_budget_of_restarts_comes_back_with_time() -> None:
    now = [0.0]
    budget = RestartBudget(2, lambda: now[0])
    assert [budget.take(), budget.take(), budget.take()] == [True, True, False]
    now[0] = WINDOW_S - 0.1
    assert not budget.take()
    now[0] = WINDOW_S
    assert budget.take()
    assert not RestartBudget(0).take()


def test_the_first_restart_is_at_once_and_the_others_are_not() -> None:
    budget = RestartBudget(3, lambda: 0.0)
    pauses = []
    while budget.take():
        pauses.append(budget.pause_s)
    assert pauses == [0, PAUSE_S, 2 * PAUSE_S]


@pytest.mark.parametrize("limit", [None, 3])
def test_what_is_on_its_way_counts_as_waiting(limit: int | None) -> None:
    queue = QueueView(limit)
    assert queue.has_room(3)
    assert queue.has_room(4) == (limit is None)
    queue.sent(2)
    assert queue.length == 2 and queue.has_room(1)
    assert queue.has_room(2) == (limit is None)
    queue.told(received=2, waiting=0)  # both run
    queue.sent(3)
    queue.told(received=3, waiting=1)
    assert queue.length == 3
    assert queue.has_room(1) == (limit is None)
    queue.told(received=5, waiting=2)
    assert queue.has_room(1)

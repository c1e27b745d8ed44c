"""The drills with the real engine, in small: what must hold on a machine of any speed. Times are for the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from benchmarks.drills import drills
from benchmarks.drills.clients import Ending
from benchmarks.drills.figures import Figure, worst

SMALL: dict[str, Callable[[], list[Figure]]] = {
    **drills.DRILLS,
    "disconnects": partial(drills.disconnects, count=150, at_once=8),
    "overload": partial(drills.overload, seconds=4.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_drill(name: str) -> None:
    figures = SMALL[name]()
    assert [figure for figure in figures if figure.exact and not figure.met] == []


def test_the_worst_run_counts() -> None:
    runs = [[Figure("a_s", 1.0, 2), Figure("b", 3, 2)], [Figure("a_s", 1.5, 2), Figure("b", 0, 2)]]
    assert worst(runs) == [Figure("a_s", 1.5, 2), Figure("b", 3, 2)]
    assert [figure.met for figure in worst(runs)] == [True, False]
    assert [figure.exact for figure in worst(runs)] == [False, True]
    assert Figure("c", 10).met


@pytest.mark.parametrize(
    ("status", "text", "proper"),
    [
        (200, '{"text": "a"}', True),
        (503, '{"error": {}}', True),
        (200, 'data: {"text": "a"}\n\ndata: [DONE]\n\n', True),
        (200, 'data: {"error": {}}\n\ndata: [DONE]\n\n', True),
        (200, 'data: {"text": "a"}\n\n', False),
        (200, 'data: {"error": {}}\n\ndata: {"error": {}}\n\ndata: [DONE]\n\n', False),
        (503, "", False),
        (0, "ReadError", False),
    ],
)
def test_what_counts_as_told_once(status: int, text: str, proper: bool) -> None:
    assert Ending(status, text, 0.0, 1.0).proper == proper

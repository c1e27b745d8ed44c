"""The drills with the real engine, in small: what must hold on a machine of any speed. Times are for the benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from benchmarks.drills import drills
from benchmarks.drills.clients import Ending
from benchmarks.drills.figures import Figure, worst
from benchmarks.drills.memory import growth
from benchmarks.result_file import keep_row

SMALL: dict[str, Callable[[], list[Figure]]] = {
    **drills.DRILLS,
    "disconnects": partial(drills.disconnects, count=150, at_once=8),
    "overload": partial(drills.overload, seconds=4.0),
    "memory": partial(drills.memory, count=3000, at_once=8),
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


def test_names_say_the_unit() -> None:
    figures = [Figure("a_s", 1.0), Figure("b_kib", 1.0), Figure("c", 1.0)]
    assert [(figure.title, figure.unit, figure.exact) for figure in figures] == [
        ("a", " s", False),
        ("b", " KiB", False),
        ("c", "", True),
    ]


def test_growth_is_that_behind_the_warm_up() -> None:
    assert growth([0.0, 500.0, 900.0, *([1000.0, 1004.0] * 4)]) == pytest.approx(0.0, abs=1.0)
    assert growth([0.0, 5000.0, *range(9000, 9800, 100)]) == pytest.approx(100.0)


def test_a_row_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row in ({"benchmark": "a", "x": 1}, {"benchmark": "b", "x": 2}, {"benchmark": "a", "x": 3}):
        keep_row(path, row)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"benchmark": "a", "x": 3}, {"benchmark": "b", "x": 2}]
    assert [child.name for child in tmp_path.iterdir()] == ["rows.jsonl"]


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

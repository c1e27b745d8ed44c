"""Intervals, tests and corrections against values that are known from elsewhere or can be counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.quality.statistics import compare, holm, wilson

ONE_EACH = 40  # documents with a question each


def single(right: int, count: int = ONE_EACH) -> list[list[int]]:
    """Documents of one question, the first `right` of them answered."""
    return [[int(i < right)] for i in range(count)]


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),  # Brown, Cai and DasGupta 2001; statsmodels' proportion_confint gives the same
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (50, 100, 0.4038315, 0.5961685),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-6)


def test_holm_against_a_worked_example() -> None:
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_never_exceeds_one_and_keeps_the_order() -> None:
    adjusted = holm([0.9, 0.8, 0.001, 0.3])
    assert adjusted == pytest.approx([1.0, 1.0, 0.004, 0.9])
    assert holm([]) == []


def test_equal_outcomes_do_not_differ() -> None:
    assert compare([(single(17), single(17))]) == (0.0, 0.0, 0.0, 1.0, 1.0)


def test_the_interval_is_that_of_the_normal_approximation() -> None:
    """12 of 40 documents answered by a alone: a mean of 0.3 with a standard error of sqrt(0.3 * 0.7 / 40)."""
    found = compare([(single(32), single(20))])
    error = 1.96 * math.sqrt(0.3 * 0.7 / ONE_EACH)
    assert found.mean == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx((0.3 - error, 0.3 + error), abs=0.03)
    assert found.p == pytest.approx(2 * 0.5**12)  # all twelve signs alike, either way
    assert found.p_worse == 1.0


def test_few_differing_documents_prove_nothing() -> None:
    """Three of three in favour of b: the smallest p-value there is, 1 of 8, however many documents agree."""
    found = compare([(single(20), single(23))])
    assert found.p_worse == pytest.approx(1 / 8)
    assert found.p == pytest.approx(2 / 8)


def test_random_signs_agree_with_all_signs() -> None:
    """15 documents for a and 5 for b: the sign test's binomial tail, from random patterns."""
    a, b = single(15, 20), [[1 - bit] for [bit] in single(15, 20)]
    tail = sum(math.comb(20, k) for k in range(15, 21)) / 2**20
    found = compare([(a, b)])
    assert found.p == pytest.approx(2 * tail, abs=0.01)
    assert found.p_worse == pytest.approx(1 - tail + math.comb(20, 15) / 2**20, abs=0.02)


def test_questions_of_a_document_are_one_draw() -> None:
    """The same ten gains: in ten documents they are sure, in two documents of five questions they are not."""
    spread = compare([(single(30), single(20))])
    together = compare([([[1] * 5, [1] * 5, *([[0]] * 30)], [[0] * 5, [0] * 5, *([[0]] * 30)])])
    assert together.mean == spread.mean == 0.25
    assert together.p == pytest.approx(0.5)
    assert spread.p == pytest.approx(2 * 0.5**10)
    assert together.low < 0.02 < spread.low


def test_cells_weigh_the_same_whatever_their_size() -> None:
    small, large = ([[1]] * 4, [[0]] * 4), ([[0]] * 400, [[0]] * 400)
    assert compare([small, large]).mean == pytest.approx(0.5)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits, trials = 0, 200
    for trial in range(trials):
        a, b = (rng.random((40, 3)) < 0.7), (rng.random((40, 3)) < 0.6)
        found = compare([(a.astype(int).tolist(), b.astype(int).tolist())], seed=trial, rounds=1000)
        hits += found.low <= 0.1 <= found.high
    assert 0.9 <= hits / trials <= 0.99


def test_unpaired_outcomes_are_refused() -> None:
    with pytest.raises(AssertionError, match="unpaired"):
        compare([([[1, 0]], [[1], [0]])])

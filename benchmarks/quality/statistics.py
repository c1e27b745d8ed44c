"""Intervals and tests for paired right/wrong outcomes. Knows no method and no file.

Questions of one document are not independent, so whatever compares two settings draws documents, not questions. An
outcome of a document is a sequence of 0 and 1, one per question; paired outcomes have the same documents and questions
in the same order. Differences are shares (0.01 = one point). A comparison over several cells (task and context) gives
each cell the same weight and resamples inside the cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Outcomes = Sequence[Sequence[int]]  # of one cell: per document, per question

Z95 = 1.959963984540054  # of the normal distribution, two-sided 95 %
ROUNDS = 10_000
_EXACT = 12  # documents that differ, up to which all sign patterns are tried instead of random ones


class Difference(NamedTuple):
    """Mean of a minus b, its 95 % bootstrap interval, and p-values of the sign-flip test against no difference.

    p_worse: against the one-sided alternative that a is worse than b; p: two-sided.
    """

    mean: float
    low: float
    high: float
    p: float
    p_worse: float


def wilson(right: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927); the whole line if nothing was counted."""
    if not count:
        return 0.0, 1.0
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / count / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def compare(cells: Sequence[tuple[Outcomes, Outcomes]], seed: int = 0, rounds: int = ROUNDS) -> Difference:
    """a against b over cells of paired outcomes: bootstrap interval and sign-flip test, both by document.

    The test is not the bootstrap's share of differences below zero: with few documents that differ, that share is far
    too small.
    """
    assert cells, "nothing to compare"
    weights = [_weights(a, b) for a, b in cells]
    flat = np.concatenate([w.gain / w.questions.sum() for w in weights]) / len(cells)
    mean = float(flat.sum())
    if not flat.any():
        return Difference(0.0, 0.0, 0.0, 1.0, 1.0)
    rng = np.random.default_rng(seed)
    low, high = np.quantile(_bootstrap(weights, rng, rounds), [0.025, 0.975])
    p, p_worse = _sign_flips(flat[flat != 0], rng, rounds)
    return Difference(mean, float(low), float(high), p, p_worse)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that keep the family-wise error (Holm 1979), in the given order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


class _Weights(NamedTuple):
    """Per document: right answers of a minus those of b, and questions."""

    gain: NDArray[np.float64]
    questions: NDArray[np.float64]


def _weights(a: Outcomes, b: Outcomes) -> _Weights:
    assert [len(document) for document in a] == [len(document) for document in b], "unpaired outcomes"
    gain = [float(sum(x) - sum(y)) for x, y in zip(a, b, strict=True)]
    return _Weights(np.array(gain), np.array([float(len(document)) for document in a]))


def _bootstrap(cells: Sequence[_Weights], rng: np.random.Generator, rounds: int) -> NDArray[np.float64]:
    """Mean differences of resampled documents, one per round."""
    total = np.zeros(rounds)
    for cell in cells:
        drawn = rng.integers(0, cell.gain.size, (rounds, cell.gain.size))
        total += cell.gain[drawn].sum(1) / cell.questions[drawn].sum(1)
    return total / len(cells)


def _sign_flips(gains: NDArray[np.float64], rng: np.random.Generator, rounds: int) -> tuple[float, float]:
    """Two-sided and one-sided (sum too low) p-values of the documents' gains if each sign were a coin's."""
    if gains.size <= _EXACT:
        signs = np.array(list(product((-1.0, 1.0), repeat=gains.size)))
        extra = 0
    else:
        signs = rng.choice((-1.0, 1.0), (rounds, gains.size))
        extra = 1  # what was seen counts as one of the patterns
    sums = signs @ gains
    seen, slack = gains.sum(), 1e-9 * np.abs(gains).sum()
    two = (np.abs(sums) >= abs(seen) - slack).sum() + extra
    worse = (sums <= seen + slack).sum() + extra
    return float(two / (sums.size + extra)), float(worse / (sums.size + extra))

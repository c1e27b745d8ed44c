"""Paths through a block against trying every token sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_runtime.grammar import block_paths, token_automaton
from losa_runtime.grammar.block_paths import Block, Reach, best_path, draw_path
from tests.grammar.toy import END, PIECES, TEXT, automaton, can_finish, logp, usable

PATTERNS = ("", "a*", "(ab)*", "a{2,3}|b", "(a|bé*)+b?", "é{1,2}", "[^a]*", "(ab|abb)é?", "b.{0,2}a")
KNOWN = st.lists(st.sampled_from([-1, -1, -1, *TEXT, END]), min_size=1, max_size=4)


@given(st.sampled_from(PATTERNS), KNOWN, st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_what_is_allowed_is_what_some_usable_filling_has(pattern: str, known: list[int], room: int) -> None:
    reach = Reach(automaton(pattern), Block(np.array(known), 0, room))
    fillings = usable(pattern, known, room)
    assert reach.possible == bool(fillings)
    for hole in (i for i, token in enumerate(known) if token < 0):
        assert np.flatnonzero(reach.allowed(hole)).tolist() == sorted({tokens[hole] for tokens in fillings})


@given(st.sampled_from(PATTERNS), KNOWN, st.integers(0, 2), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_the_best_path_is_the_best_of_all(pattern: str, known: list[int], room: int, seed: int) -> None:
    reach = Reach(automaton(pattern), Block(np.array(known), 0, room))
    fillings = usable(pattern, known, room)
    holes = [i for i, token in enumerate(known) if token < 0]
    probabilities = logp(np.random.default_rng(seed), holes)
    if not fillings:
        with pytest.raises(ValueError, match="no token sequence"):
            best_path(reach, probabilities)
        return
    found = best_path(reach, probabilities)
    assert tuple(found) in fillings
    assert _score(found, holes, probabilities) == pytest.approx(
        max(_score(tokens, holes, probabilities) for tokens in fillings)
    )


@given(st.sampled_from(PATTERNS), KNOWN, st.integers(0, 2), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_looking_at_the_likeliest_only_still_gives_a_usable_filling(
    pattern: str, known: list[int], room: int, seed: int
) -> None:
    fillings = usable(pattern, known, room)
    if fillings:
        holes = [i for i, token in enumerate(known) if token < 0]
        probabilities = logp(np.random.default_rng(seed), holes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_automaton, "WIDE", 1)
            patch.setattr(block_paths, "LIKELIEST", 2)
            reach = Reach(automaton(pattern), Block(np.array(known), 0, room))
            for hole in holes:
                assert np.flatnonzero(reach.allowed(hole)).tolist() == sorted({tokens[hole] for tokens in fillings})
            assert tuple(best_path(reach, probabilities)) in fillings
            assert tuple(draw_path(reach, probabilities, dict.fromkeys(holes, 0.7))) in fillings


def test_drawn_paths_have_their_probabilities() -> None:
    pattern, known = "(a|bé*)+b?", [-1, 0, -1]
    reach = Reach(automaton(pattern), Block(np.array(known), 0, 1))
    fillings = usable(pattern, known, 1)
    probabilities = logp(np.random.default_rng(3), [0, 2])
    weights = np.exp([_score(tokens, [0, 2], probabilities) for tokens in fillings])
    rng, counts, n = np.random.default_rng(0), dict.fromkeys(fillings, 0), 4000
    for _ in range(n):
        counts[tuple(draw_path(reach, probabilities, {0: rng.random(), 2: rng.random()}).tolist())] += 1
    expected = weights / weights.sum()
    seen = np.array([counts[tokens] for tokens in fillings]) / n
    assert np.abs(seen - expected).max() < 4 * np.sqrt(expected.max() / n)


@given(st.sampled_from(PATTERNS), st.lists(st.sampled_from(TEXT), max_size=3), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_whether_an_output_can_finish(pattern: str, tokens: list[int], room: int) -> None:
    found = automaton(pattern)
    state = found.walk(np.array(tokens, dtype=np.int64))
    text = b"".join(PIECES[t] for t in tokens)
    assert (state >= 0 and found.can_finish(state, room)) == can_finish(pattern, text, room)


def test_zero_probability_everywhere_still_gives_a_usable_filling() -> None:
    reach = Reach(automaton("(ab)*b"), Block(np.array([-1, -1, -1]), 0, 0))
    nothing = {hole: np.full(len(PIECES), -np.inf) for hole in range(3)}
    for found in (best_path(reach, nothing), draw_path(reach, nothing, dict.fromkeys(range(3), 0.5))):
        assert tuple(found.tolist()) in usable("(ab)*b", [-1, -1, -1], 0)


def test_without_ends_an_output_ends_by_its_length_alone() -> None:
    reach = Reach(automaton("a*", frozenset()), Block(np.array([-1, -1]), 0, 0))
    assert np.flatnonzero(reach.allowed(0)).tolist() == [0]


def _score(tokens: np.ndarray | tuple[int, ...], holes: list[int], probabilities: dict[int, np.ndarray]) -> float:
    """What counts is before the end: holes behind it ask for nothing."""
    listed = [int(t) for t in tokens]
    end = listed.index(END) if END in listed else len(listed)
    return float(sum(probabilities[hole][listed[hole]] for hole in holes if hole <= end))

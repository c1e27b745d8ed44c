"""Sampling against an independent oracle, row by row, and the promises made to users."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_runtime.decoding.rng import uniform
from losa_runtime.decoding.sampling import Bans, Measures, Sampled, SamplingRows, UnusableLogits, sample
from tests.decoding import oracle

MASK = 3
EVERYTHING = Measures(Measures(entropy=True), margin=True)
Wish = tuple[float, int, float, float, float]  # temperature, top_k, top_p, min_p, uniform number
CHOICES = (
    [0.0, 0.05, 0.5, 1.0, 1.7, 20.0],
    [-1, 1, 2, 3, 7, 100],
    [1e-9, 0.15, 0.41, 0.73, 0.93, 1.0],
    [0.0, 0.03, 0.37, 0.81, 1.0],
)


def rows_of(parameters: list[Wish]) -> SamplingRows:
    t, k, p, m, u = zip(*parameters, strict=True)
    f64 = torch.float64
    return SamplingRows(
        torch.tensor(t, dtype=f64),
        torch.tensor(k),
        torch.tensor(p, dtype=f64),
        torch.tensor(m, dtype=f64),
        torch.tensor(u, dtype=f64),
    )


def take(rows: SamplingRows, index: slice) -> SamplingRows:
    return SamplingRows(*(column[index] for column in rows))


# Few distinct logits, so that ties are the rule and not the exception.
logit = st.one_of(st.integers(-3, 3).map(float), st.floats(-20, 20, width=32))
numbers = st.sampled_from([0.0, 0.137, 0.291, 0.553, 0.819, 1 - 2.0**-53])
parameter = st.tuples(*(st.sampled_from(choice) for choice in CHOICES), numbers)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], list[Wish], Bans, list[set[int]]]:
    R, V = draw(st.integers(1, 5)), draw(st.integers(5, 12))
    vocab_size = draw(st.integers(5, V))
    logits = draw(st.lists(st.lists(logit, min_size=V, max_size=V), min_size=R, max_size=R))
    pairs = draw(st.lists(st.tuples(st.integers(0, R - 1), st.integers(0, 2)), max_size=4))
    rows, ids = ([x[i] for x in pairs] for i in (0, 1))
    bans = Bans(MASK, vocab_size, torch.tensor(rows, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64))
    banned = [{MASK, *range(vocab_size, V), *(i for r, i in pairs if r == row)} for row in range(R)]
    return logits, draw(st.lists(parameter, min_size=R, max_size=R)), bans, banned


def near_a_filter_border(
    logits: list[float], p: list[float], banned: set[int], top_k: int, top_p: float, min_p: float
) -> bool:
    """Whether rounding could move an id across a filter: then both answers are right and none is compared."""
    eps = 1e-9
    low, high = (
        oracle.kept_ids(logits, p, banned, top_k, min(1.0, top_p * f) if top_p < 1 else 1.0, min_p * g)
        for f, g in ((1 - eps, 1 + eps), (1 + eps, 1 - eps))
    )
    return low != high and min_p < 1


def check_row(got: Sampled, r: int, logits: list[float], banned: set[int], wish: Wish) -> None:
    """Row r of the result against the oracle."""
    t, top_k, top_p, min_p, u = wish
    p, token = oracle.distribution(logits, t, banned), int(got.token_R[r])
    if t == 0:
        assert token == oracle.greedy(logits, banned)
    elif not near_a_filter_border(logits, p, banned, top_k, top_p, min_p):
        kept = oracle.kept_ids(logits, p, banned, top_k, top_p, min_p)
        # A number within rounding of a step of the cumulative sum may fall on either side.
        assert token in {oracle.draw(p, kept, min(max(u + d, 0.0), 1 - 2.0**-53)) for d in (-1e-12, 0.0, 1e-12)}
        assert token in kept
    assert got.confidence_R[r] == pytest.approx(p[token], rel=1e-5)
    assert got.logprob_R[r] == pytest.approx(math.log(p[token]), rel=1e-5, abs=1e-6)
    assert got.entropy_R is not None
    assert got.entropy_R[r] == pytest.approx(-math.fsum(x * math.log(x) for x in p if x > 0), rel=1e-5, abs=1e-6)
    assert got.margin_R is not None
    second, first = sorted(p)[-2:]
    assert got.margin_R[r] == pytest.approx(first - second, rel=1e-5, abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_equals_the_oracle(case: tuple) -> None:
    logits, parameters, bans, banned = case
    got = sample(torch.tensor(logits), rows_of(parameters), bans, EVERYTHING)
    for r, wish in enumerate(parameters):
        check_row(got, r, logits[r], banned[r], wish)


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", [4, *(pytest.param(s, marks=pytest.mark.slow) for s in range(100, 112))])
def test_thousands_of_mixed_rows_equal_the_oracle(ties: bool, seed: int) -> None:
    """One call whose rows all carry different parameters and bans."""
    chance, R, V = random.Random(seed), 3000, 13
    logits = torch.tensor([[chance.randint(-2, 2) if ties else chance.gauss(0, 3) for _ in range(V)] for _ in range(R)])
    logits = logits.float()
    wishes: list[Any] = [(*(chance.choice(c) for c in CHOICES), chance.random()) for _ in range(R)]
    pairs = [(r, i) for r in range(R) for i in (0, 4) if chance.random() < 0.2]
    row_N, id_N = torch.tensor(pairs).T
    got = sample(logits, rows_of(wishes), Bans(MASK, V - 2, row_N, id_N), EVERYTHING)
    banned = [{MASK, V - 2, V - 1} for _ in range(R)]
    for row, token in pairs:
        banned[row].add(token)
    for r, wish in enumerate(wishes):
        check_row(got, r, logits[r].tolist(), banned[r], wish)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_row_alone_gives_the_same(case: tuple) -> None:
    logits, parameters, bans, banned = case
    rows = rows_of(parameters)
    together = sample(torch.tensor(logits), rows, bans)
    for r in range(len(logits)):
        ids = torch.tensor(list(banned[r]))
        alone = sample(
            torch.tensor(logits[r : r + 1]),
            take(rows, slice(r, r + 1)),
            Bans(MASK, bans.vocab_size, torch.zeros_like(ids), ids),
        )
        for a, b in zip(alone[:3], together[:3], strict=True):
            assert a[0] == b[r]


def test_a_large_vocabulary_gives_the_same_alone_and_in_passes() -> None:
    """More than one pass of rows, and nuclei on both sides of the narrow first look."""
    torch.manual_seed(0)
    R, V = 60, 150_000
    scale = torch.linspace(0.01, 6, R)[:, None]
    logits = torch.randn(R, V).mul_(scale)
    wishes = [
        (1.0, -1, 0.9, 0.0),
        (0.7, 50, 0.95, 0.0),
        (1.3, 1000, 0.8, 0.0),
        (1.0, -1, 1.0, 0.02),
        (0.0, -1, 1.0, 0.0),
    ]
    rows = rows_of([(*wishes[r % 5], (r * 0.377) % 1) for r in range(R)])
    got = sample(logits, rows, Bans(MASK, V - 100))
    for r in (0, 1, 2, 27, 29, 58):
        alone = sample(logits[r : r + 1], take(rows, slice(r, r + 1)), Bans(MASK, V - 100))
        assert [a[0] for a in alone[:3]] == [b[r] for b in got[:3]]
    r = 2  # top_k 1000 and top_p: the nucleus is measured within the thousand
    p = oracle.distribution(logits[r].tolist(), 1.3, {MASK, *range(V - 100, V)})
    kept = oracle.kept_ids(logits[r].tolist(), p, {MASK, *range(V - 100, V)}, 1000, 0.8, 0.0)
    assert int(got.token_R[r]) == oracle.draw(p, kept, float(rows.uniform_R[r]))


def test_bans_find_their_rows_in_later_passes() -> None:
    R, V = 70, 100_000
    best = torch.arange(R) * 7 + 10
    logits = torch.zeros(R, V)
    logits[torch.arange(R), best] = 5.0
    odd = torch.arange(1, R, 2)
    got = sample(logits, rows_of([(0.0, -1, 1.0, 0.0, 0.0)] * R), Bans(MASK, V, odd, best[odd]))
    assert got.token_R.tolist() == [0 if r % 2 else 10 + 7 * r for r in range(R)]


def test_a_number_on_the_border_belongs_to_the_next_token() -> None:
    logits = torch.tensor([[-99.0, 1.0, 1.0, 9.0, -99.0]] * 2)
    got = sample(logits, rows_of([(1.0, 2, 1.0, 0.0, 0.5), (1.0, 2, 1.0, 0.0, 0.5 - 2.0**-54)]), Bans(MASK, 5))
    assert got.token_R.tolist() == [2, 1]


def many(logits: list[float], count: int, **parameters: float) -> torch.Tensor:
    """Tokens of `count` rows with the same logits and parameters, each with its own random number."""
    positions = torch.arange(count)
    u = uniform(torch.full((count,), 11), positions, torch.zeros_like(positions))
    rows = SamplingRows(
        torch.full((count,), parameters.get("temperature", 1.0)),
        torch.full((count,), int(parameters.get("top_k", -1))),
        torch.full((count,), parameters.get("top_p", 1.0)),
        torch.full((count,), parameters.get("min_p", 0.0)),
        u,
    )
    return sample(torch.tensor(logits).expand(count, -1), rows, Bans(MASK, len(logits))).token_R


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_frequencies_follow_the_exact_probabilities(parameters: dict[str, float]) -> None:
    count, logits = 40_000, [0.3, 1.2, -0.5, 9.0, 2.0, 0.0, 1.9, -2.0]
    tokens = many(logits, count, **parameters)
    p = oracle.distribution(logits, parameters.get("temperature", 1.0), {MASK})
    kept = oracle.kept_ids(
        logits, p, {MASK}, int(parameters.get("top_k", -1)), parameters.get("top_p", 1.0), parameters.get("min_p", 0.0)
    )
    mass = math.fsum(p[i] for i in kept)
    seen = torch.bincount(tokens, minlength=len(logits)).tolist()
    assert {i for i, n in enumerate(seen) if n} <= kept
    chi_square = sum((seen[i] - count * p[i] / mass) ** 2 / (count * p[i] / mass) for i in kept)
    assert chi_square < 40  # at most 6 degrees of freedom, p < 1e-6


def test_mixed_parameters_land_on_their_own_rows() -> None:
    """Two requests of three positions: rows are r0 r0 r0 r1 r1 r1, and so must their parameters be.

    A public engine lays them out as r0 r1 r0 r1 r0 r1 and gives requests each other's temperature.
    """
    logits = torch.tensor([0.0, 1.0, 2.0, 9.0, 3.0]).expand(6, -1)
    greedy, low = (0.0, -1, 1.0, 0.0, 0.0), (1.0, -1, 1.0, 0.0, 0.0)  # number 0 finds the lowest id that is kept
    got = sample(logits, rows_of([greedy] * 3 + [low] * 3), Bans(MASK, 5))
    assert got.token_R.tolist() == [4, 4, 4, 0, 0, 0]
    variety = [
        greedy,
        low,
        (1.0, 2, 1.0, 0.0, 0.0),
        (1.0, -1, 0.7, 0.0, 0.0),
        (1.0, -1, 1.0, 0.3, 0.0),
        (9.0, 1, 1.0, 0.0, 0.9),
    ]
    got = sample(logits, rows_of(variety), Bans(MASK, 5))
    assert got.token_R.tolist() == [4, 0, 2, 2, 2, 4]


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-9, 1.0, 100.0])
def test_mask_and_unknown_ids_are_never_sampled(temperature: float) -> None:
    logits = torch.full((64, 12), -5.0)
    logits[:, MASK] = 50.0
    logits[:, 9:] = 60.0
    u = torch.linspace(0, 1 - 2.0**-53, 64, dtype=torch.float64).tolist()
    for top_k in (-1, 1, 2, 12):
        rows = rows_of([(temperature, top_k, 1.0, 0.0, x) for x in u])
        got = sample(logits, rows, Bans(MASK, 9))
        assert set(got.token_R.tolist()) <= {0, 1, 2, 4, 5, 6, 7, 8}
        assert got.confidence_R.tolist() == pytest.approx([1 / 8] * 64)


def test_banned_rows_leave_their_probability_to_the_others() -> None:
    """EOS is banned before the softmax: no confidence flows into it."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 30.0]] * 2)
    rows = rows_of([(0.0, -1, 1.0, 0.0, 0.0)] * 2)
    got = sample(logits, rows, Bans(MASK, 5, torch.tensor([1]), torch.tensor([4])))
    assert got.token_R.tolist() == [4, 0]
    assert got.confidence_R[1] == pytest.approx(1 / 3)


def test_greedy_takes_the_lowest_of_equals_and_reports_the_untempered_probability() -> None:
    got = sample(torch.tensor([[1.0, 2.0, 2.0, 2.0, 2.0]]), rows_of([(0.0, -1, 1.0, 0.0, 0.9)]), Bans(MASK, 5))
    assert got.token_R.tolist() == [1]
    assert got.confidence_R[0] == pytest.approx(math.e / (1 + 3 * math.e))


@pytest.mark.parametrize("narrow", [(5.0, 1, 1.0, 0.0), (5.0, -1, 1e-12, 0.0), (5.0, -1, 1.0, 1.0)])
def test_the_narrowest_filters_are_greedy_with_an_unfiltered_confidence(narrow: tuple) -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, 7.0, 0.0]])
    got = sample(logits, rows_of([(*narrow, 0.999)]), Bans(MASK, 5))
    assert got.token_R.tolist() == [1]
    assert got.confidence_R[0] == pytest.approx(oracle.distribution(logits[0].tolist(), 5.0, {MASK})[1])


def test_rows_that_cannot_be_sampled_are_named() -> None:
    logits = torch.zeros(4, 5)
    logits[1, 2] = math.nan
    logits[3, 0] = math.inf
    every = torch.arange(5)
    with pytest.raises(UnusableLogits) as caught:
        sample(logits, rows_of([(1.0, 2, 0.9, 0.0, 0.5)] * 4), Bans(MASK, 5, torch.zeros_like(every), every))
    assert caught.value.rows == (0, 1, 3)


def test_logits_are_left_alone_and_half_precision_is_read_as_it_is() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = logits.clone()
    rows = rows_of([(0.8, 3, 0.9, 0.1, 0.4)] * 4)
    got = sample(logits, rows, Bans(MASK, 9))
    assert torch.equal(logits, before)
    for a, b in zip(got[:3], sample(logits.float(), rows, Bans(MASK, 9))[:3], strict=True):
        assert torch.equal(a, b)


def test_no_rows_give_no_tokens() -> None:
    empty = torch.empty(0, dtype=torch.float64)
    got = sample(torch.empty(0, 5), SamplingRows(empty, empty.long(), empty, empty, empty), Bans(MASK, 5))
    assert isinstance(got, Sampled)
    assert all(len(column) == 0 for column in got[:3])


@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(0.1, 8))
def test_shifting_all_logits_changes_nothing(case: tuple, shift: float) -> None:
    logits, parameters, bans, _ = case
    exact = [[float(round(x)) for x in row] for row in logits]
    parameters = [((0.0, 0.5, 1.0)[i % 3], *others) for i, (_, *others) in enumerate(parameters)]
    a = sample(torch.tensor(exact), rows_of(parameters), bans)
    b = sample(torch.tensor(exact) + float(round(shift)), rows_of(parameters), bans)
    assert torch.equal(a.token_R, b.token_R)
    assert torch.equal(a.confidence_R, b.confidence_R)


@pytest.mark.parametrize("vocab", [7, 1023, 1024, 5000, 151_936])
def test_a_greedy_probability_is_exact_and_the_same_in_any_company(vocab: int) -> None:
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab)) * 4
    logits[0] += 300.0
    logits[1, 3] = 60.0  # nearly certain
    logits[2] = 1.0  # all alike
    bans = Bans(0, vocab)
    greedy = rows_of([(0.0, -1, 1.0, 0.0, 0.5)] * 9)
    got = sample(logits, greedy, bans)
    wanted = logits[:, 1:].double().log_softmax(-1).amax(-1)
    assert torch.allclose(got.logprob_R.double(), wanted, rtol=1e-6, atol=1e-6)
    for row in range(9):
        alone = sample(logits[row : row + 1], take(greedy, slice(0, 1)), bans)
        assert alone.logprob_R[0] == got.logprob_R[row], "bit for bit"
    mixed = rows_of([(t, -1, 1.0, 0.0, 0.5) for t in (0.0, 0.7, 0.0) * 3])
    still = mixed.temperature_R == 0
    for entropy in (False, True):
        found = sample(logits, mixed, bans, Measures(entropy, margin=entropy))
        assert torch.equal(found.logprob_R[still], got.logprob_R[still]), "what others ask for changes nothing"

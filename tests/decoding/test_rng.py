"""The random numbers: frozen values, uniformity, independence of neighbours, no dependence on the batch."""

from __future__ import annotations

import pytest
import torch

from losa_runtime.decoding.rng import uniform

# (seed, position, step) -> value. Never to be changed: a seed that a user wrote down must give the same text for ever.
FROZEN = [
    (0, 0, 0, 0.06351329568025821),
    (1, 0, 0, 0.6315257433100353),
    (0, 1, 0, 0.09882755180113068),
    (0, 0, 1, 0.20873648063924233),
    (42, 1000, 7, 0.05794833390375065),
    (123456789, 17, 3, 0.6025369562891306),
    (2**63 - 1, 131071, 31, 0.9303293022776246),
]


def numbers(seeds: object, positions: object, steps: object) -> torch.Tensor:
    seeds, positions, steps = (torch.as_tensor(x, dtype=torch.int64) for x in (seeds, positions, steps))
    return uniform(*(x.contiguous() for x in torch.broadcast_tensors(seeds, positions, steps)))


@pytest.mark.parametrize(("seed", "position", "step", "value"), FROZEN)
def test_values_are_frozen(seed: int, position: int, step: int, value: float) -> None:
    assert numbers([seed], [position], [step]).item() == value


def splitmix(x: int) -> int:
    """The published finaliser on unbounded integers, as an independent check of the signed arithmetic."""
    word = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return x ^ (x >> 31)


def test_equals_the_definition_in_unbounded_integers() -> None:
    words = [0, 1, 2, 41, 2**31, 2**53 + 1, 2**63 - 1]
    constants = (0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A, 0xDAA66D2C7DDF743F)
    for seed, position, step in [(a, b, c) for a in words for b in words[:5] for c in words[:4]]:
        state = 0
        for word, constant in zip((seed, position, step), constants, strict=True):
            state = splitmix(state ^ splitmix((word + constant) % 2**64))
        assert numbers([seed], [position], [step]).item() == (state >> 11) / 2**53


def test_a_number_does_not_depend_on_its_neighbours() -> None:
    together = numbers(7, torch.arange(100), 3)
    assert together.tolist() == [numbers([7], [p], [3]).item() for p in range(100)]


@pytest.mark.parametrize("axis", ["seed", "position", "step"])
def test_uniform_and_uncorrelated_along_each_axis(axis: str) -> None:
    count = 1 << 16
    arguments = {"seed": torch.tensor(5), "position": torch.tensor(9), "step": torch.tensor(2)}
    arguments[axis] = torch.arange(count)
    u = numbers(*arguments.values())
    assert u.min() >= 0
    assert u.max() < 1
    bins = torch.histc(u, bins=64, min=0, max=1)
    chi_square = ((bins - count / 64) ** 2 / (count / 64)).sum().item()
    assert chi_square < 124  # 63 degrees of freedom, p = 1e-5
    centred = u - u.mean()
    for lag in (1, 2, 3, 4, 8, 16, 32):
        correlation = (centred[lag:] * centred[:-lag]).mean() / centred.square().mean()
        assert abs(correlation) < 4.5 / count**0.5


def test_pairs_fill_the_square() -> None:
    """Neighbouring positions and steps, jointly: a lattice structure would leave cells empty or crowded."""
    positions = torch.arange(1 << 16)
    for a, b in (((1, positions, 0), (1, positions, 1)), ((1, positions, 0), (2, positions, 0))):
        cell = (numbers(*a) * 16).long() * 16 + (numbers(*b) * 16).long()
        bins = torch.bincount(cell, minlength=256).double()
        assert ((bins - 256) ** 2 / 256).sum() < 361  # 255 degrees of freedom, p = 1e-5


def test_every_argument_bit_changes_half_of_the_result() -> None:
    base = numbers(torch.arange(2000), 77, 5)
    for bit in (0, 1, 5, 17, 31, 40, 62):
        for changed in (
            numbers(torch.arange(2000) ^ (1 << bit), 77, 5),
            numbers(torch.arange(2000), 77 ^ (1 << bit), 5),
            numbers(torch.arange(2000), 77, 5 ^ (1 << bit)),
        ):
            flipped = ((base * 2**32).long() ^ (changed * 2**32).long()).unsqueeze(1) >> torch.arange(32) & 1
            assert abs(flipped.double().mean() - 0.5) < 0.01


def test_swapped_arguments_differ() -> None:
    values = [numbers([a], [b], [c]).item() for a in range(6) for b in range(6) for c in range(6)]
    assert len(set(values)) == len(values)

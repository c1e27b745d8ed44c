"""Triton's experts against the reference: few tokens, many, crowded, rests of every kind."""

from __future__ import annotations

import pytest
import torch

from losa_kernels.triton import experts
from losa_kernels.triton.experts import mix_experts
from tests.kernels.experts import Mixture, make_mixture
from tests.kernels.interpreter import DEVICE

BOUND = {torch.float32: 1e-5, torch.float16: 2e-3}


def on_device(mixture: Mixture) -> Mixture:
    return Mixture(*(x.to(DEVICE) for x in mixture))


def check(mixture: Mixture, same_bits: bool = False) -> None:
    mixture = on_device(mixture)
    found = mix_experts(*mixture, same_bits=same_bits)
    assert found.dtype == mixture.x.dtype and found.shape == mixture.x.shape
    bound = BOUND[found.dtype] * mixture.exact.abs().max()
    assert ((found.double() - mixture.exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize(("tokens", "crowded"), [(1, False), (7, True), (20, False)])
def test_sums_are_those_of_the_reference(dtype: torch.dtype, tokens: int, crowded: bool) -> None:
    check(make_mixture(tokens, dtype=dtype, crowded=crowded))
    check(make_mixture(tokens, dtype=dtype, hidden=96, width=70, crowded=crowded), same_bits=True)


def test_many_tokens_fill_higher_tiles() -> None:
    mixture = on_device(make_mixture(150, experts=3, hidden=20, width=18))
    assert experts._tiling(mixture.chosen, 3, 64).expert.shape == (3 + 300 // 64,)
    check(mixture)
    check(make_mixture(150, experts=3, hidden=20, width=18, crowded=True))


@pytest.mark.parametrize("crowded", [True, False])
@pytest.mark.parametrize("rows", [16, 32])
def test_tiles_cover_each_pair_once_by_its_expert(crowded: bool, rows: int) -> None:
    mixture = make_mixture(90, experts=9, per_token=3, crowded=crowded)
    tiling = experts._tiling(mixture.chosen, 9, rows)
    seen: list[int] = []
    for expert, first in zip(tiling.expert.tolist(), tiling.first.tolist(), strict=True):
        if expert < 9:
            mine = tiling.order[first : min(first + rows, int(tiling.ends[expert]))].tolist()
            assert mine and all(int(mixture.chosen.flatten()[pair]) == expert for pair in mine)
            seen += mine
    assert sorted(seen) == list(range(270))


def test_nothing_to_do_and_wrong_arguments() -> None:
    mixture = on_device(make_mixture(0))
    assert mix_experts(*mixture).shape == (0, 40)
    mixture = on_device(make_mixture(3))
    with pytest.raises(ValueError, match=r"x: found torch\.float64"):
        mix_experts(*mixture._replace(x=mixture.x.double()))
    with pytest.raises(ValueError, match="chosen: found"):
        mix_experts(*mixture._replace(chosen=mixture.chosen.int()))

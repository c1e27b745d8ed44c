"""Experts in C++ against the reference, at every SIMD level: few tokens, many, crowded, of every dtype."""

from __future__ import annotations

import pytest
import torch

from losa_kernels.native.experts import mix_experts
from losa_kernels.reference.experts import mix_experts as reference
from tests.kernels.experts import make_mixture
from tests.kernels.native import each_level, require_native

BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@each_level
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize(("tokens", "crowded"), [(0, False), (1, False), (7, True), (33, False)])
def test_sums_are_those_of_the_reference(level: str, dtype: torch.dtype, tokens: int, crowded: bool) -> None:
    kernels = require_native(level)
    for hidden, width in ((40, 24), (67, 131)):  # whole vectors and rests, columns beyond one work item
        mixture = make_mixture(tokens, hidden=hidden, width=width, dtype=dtype, crowded=crowded)
        found = mix_experts(kernels, *mixture)
        assert found.dtype == dtype and found.shape == mixture.x.shape
        scale = mixture.exact.abs().max() if tokens else 1.0
        assert ((found.double() - mixture.exact).abs() <= BOUND[dtype] * scale).all()


def test_the_reference_is_the_plain_sum() -> None:
    mixture = make_mixture(5)
    for t in range(5):
        total = torch.zeros(40, dtype=torch.float64)
        for e, weight in zip(mixture.chosen[t].tolist(), mixture.weight[t].double(), strict=True):
            both = mixture.gate_up[e].double() @ mixture.x[t].double()
            hidden = both[:24] / (1 + torch.exp(-both[:24])) * both[24:]
            total += weight * (mixture.down[e].double() @ hidden)
        torch.testing.assert_close(reference(*mixture)[t].double(), total, rtol=1e-5, atol=1e-5)


@each_level
def test_bits_do_not_depend_on_company_threads_or_passes(level: str, two_threads: None) -> None:
    kernels, mixture = require_native(level), make_mixture(700, hidden=35)
    together = mix_experts(kernels, *mixture)
    torch.set_num_threads(1)
    for which in (torch.tensor([0]), torch.arange(3, 9), torch.tensor([699, 511, 512])):
        assert torch.equal(mix_experts(kernels, *mixture.tokens(which)), together[which])


def test_large_gates_neither_overflow_nor_hide_what_is_no_number() -> None:
    kernels, mixture = require_native(), make_mixture(3)
    mixture.x[0] *= 1e4
    found = mix_experts(kernels, *mixture)
    assert ((found.double() - mixture.exact).abs() <= 1e-5 * mixture.exact.abs().amax(-1, keepdim=True)).all()
    mixture.x[1, 5] = torch.nan
    found = mix_experts(kernels, *mixture)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_wrong_arguments_are_refused() -> None:
    kernels, mixture = require_native(), make_mixture(3)
    for expert in (-1, 6):
        chosen = mixture.chosen.clone()
        chosen[2, 1] = expert
        with pytest.raises(ValueError, match=rf"chosen: found expert {expert}, allowed: below 6"):
            mix_experts(kernels, *mixture._replace(chosen=chosen))
    with pytest.raises(ValueError, match=r"x: found torch\.float64"):
        mix_experts(kernels, *mixture._replace(x=mixture.x.double()))
    with pytest.raises(ValueError, match="down: found shape"):
        mix_experts(kernels, *mixture._replace(down=mixture.down[:, 1:]))
    odd = mixture._replace(gate_up=mixture.gate_up[:, 1:].contiguous(), down=mixture.down[..., 1:].contiguous())
    with pytest.raises(ValueError, match="gate_up: found 47 rows per expert, allowed: an even number"):
        mix_experts(kernels, *odd)
    with pytest.raises(ValueError, match="weight: found shape"):
        mix_experts(kernels, *mixture._replace(weight=mixture.weight[:, :1]))

"""Mixtures of experts for tests of kernels: random weights and choices, and their exact answer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels.reference.experts import mix_experts


class Mixture(NamedTuple):
    """Arguments of `mix_experts`, in its order."""

    x: Tensor
    chosen: Tensor
    weight: Tensor
    gate_up: Tensor
    down: Tensor

    @property
    def exact(self) -> Tensor:
        """The reference's answer in float64."""
        x, chosen, weight, gate_up, down = self
        return mix_experts(x.double(), chosen, weight, gate_up.double(), down.double())

    def tokens(self, which: Tensor) -> Mixture:
        """The same experts, with these tokens only."""
        return self._replace(x=self.x[which], chosen=self.chosen[which], weight=self.weight[which])


def make_mixture(
    tokens: int,
    experts: int = 6,
    per_token: int = 2,
    hidden: int = 40,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    crowded: bool = False,
) -> Mixture:
    """crowded: all tokens go to the same experts."""
    order = torch.rand(1 if crowded else tokens, experts).argsort(-1)[:, :per_token].expand(tokens, per_token)
    return Mixture(
        torch.randn(tokens, hidden).to(dtype),
        order.contiguous(),
        torch.rand(tokens, per_token),
        (torch.randn(experts, 2 * width, hidden) * hidden**-0.5).to(dtype),
        (torch.randn(experts, hidden, width) * width**-0.5).to(dtype),
    )

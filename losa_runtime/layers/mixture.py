"""A mixture of experts in place of a feed-forward layer: a router, the experts, and perhaps one for every token.

Knows no model. Shape letters: T tokens, C hidden, E experts, I hidden of an expert, J = 2 I, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor, nn

from losa_kernels.native import experts as native
from losa_kernels.native.library import Kernels
from losa_kernels.reference.experts import mix_experts
from losa_runtime.core.expert_config import ExpertConfig
from losa_runtime.layers.linear import linear
from losa_runtime.layers.mlp import SwiGLU
from losa_runtime.layers.pieces import Piece
from losa_runtime.layers.router import Router

ExpertKernels = Literal["torch", "native", "triton"]


class Experts(nn.Module):
    """All experts of a layer in two tensors, so that one call can compute every token's.

    In a checkpoint each expert has three tensors, `{e}.{gate,up,down}_proj.weight`. `row_tile` as in
    `losa_runtime.layers.linear`; kernels: what computes them, set by `use_kernels`.
    """

    row_tile: int | None = None
    kernels: ExpertKernels = "torch"

    def __init__(self, hidden_size: int, experts: ExpertConfig) -> None:
        super().__init__()
        self.width = experts.width
        self.gate_up = nn.Parameter(torch.empty(experts.count, 2 * experts.width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts.count, hidden_size, experts.width))

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """The checkpoint's name of each part of the parameters."""
        for e in range(self.gate_up.shape[0]):
            yield f"{e}.gate_proj.weight", Piece("gate_up", (e, slice(0, self.width)))
            yield f"{e}.up_proj.weight", Piece("gate_up", (e, slice(self.width, 2 * self.width)))
            yield f"{e}.down_proj.weight", Piece("down", (e,))

    def forward(self, x_TC: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """x [T, C] -> [T, C]; chosen and weight as the router says."""
        if self.kernels == "native":
            return native.mix_experts(_library(), x_TC.contiguous(), chosen_TK, weight_TK, self.gate_up, self.down)
        if self.kernels == "triton":
            from losa_kernels.triton.experts import mix_experts as mix_on_device  # triton is not everywhere

            about = (chosen_TK, weight_TK, self.gate_up, self.down)
            return mix_on_device(x_TC.contiguous(), *about, same_bits=self.row_tile is not None)
        product = partial(linear, row_tile=self.row_tile)
        return mix_experts(x_TC, chosen_TK, weight_TK, self.gate_up, self.down, product)


@cache
def _library() -> Kernels:
    return Kernels()


def use_kernels(module: nn.Module, kernels: ExpertKernels) -> None:
    """Set what computes the experts of `module`, if it has any: the reference, C++ on the CPU, or Triton on a GPU."""
    for part in module.modules():
        if isinstance(part, Experts):
            part.kernels = kernels


class SparseMLP(nn.Module):
    """Router and experts, named as in the checkpoints."""

    def __init__(self, hidden_size: int, experts: ExpertConfig) -> None:
        super().__init__()
        self.gate = Router(hidden_size, experts)
        self.experts = Experts(hidden_size, experts)
        self.shared_experts = SwiGLU(hidden_size, experts.shared_width) if experts.shared_width else None

    def forward(self, x_TC: Tensor) -> Tensor:
        """x [T, C] -> [T, C]."""
        mixed_TC = self.experts(x_TC, *self.gate(x_TC))
        return mixed_TC if self.shared_experts is None else mixed_TC + self.shared_experts(x_TC)

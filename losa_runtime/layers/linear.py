"""A linear layer whose rows may be computed in tiles of one fixed shape. Knows no model and no batch.

A matrix library chooses its kernel by the shape of the product, and different kernels sum in different orders. With a
fixed tile every row goes through the same kernel however many rows there are, so a row's result does not depend on its
company.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROW_TILE = 32  # rows; padding costs at most this much, smaller tiles waste the matrix units


def linear(x_TC: Tensor, weight_NC: Tensor, row_tile: int | None, bias_N: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias: [T, N]. row_tile: rows per product, the last one padded with zeros; None = all in one."""
    if row_tile is None:
        return F.linear(x_TC, weight_NC, bias_N)
    rows = x_TC.shape[0]
    x_TC = F.pad(x_TC, (0, 0, 0, -rows % row_tile))
    return torch.cat([F.linear(tile, weight_NC, bias_N) for tile in x_TC.split(row_tile)])[:rows]


class Linear(nn.Linear):
    """A linear layer whose weights are to be loaded; `row_tile` as in `linear`, set by `use_row_tile`.

    widen_once: the weight is one of few bits whose product widens it first; tiles share one widened copy.
    """

    row_tile: int | None = None
    widen_once: bool = False

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        """Nothing: random numbers for tensors without memory would load torch's whole compiler, which takes seconds."""

    def forward(self, x_TC: Tensor) -> Tensor:
        """x [T, C] -> [T, N]."""
        weight_NC = self.weight.dequantize() if self.widen_once and self.row_tile is not None else self.weight
        return linear(x_TC, weight_NC, self.row_tile, self.bias)


def use_row_tile(module: nn.Module, row_tile: int | None) -> None:
    """Set the tile of every part of `module` that has one."""
    for part in module.modules():
        if hasattr(part, "row_tile"):
            part.__dict__["row_tile"] = row_tile  # not a parameter, whatever the type checker thinks of modules

"""The gated feed-forward layer of Llama-like models. Knows no model and no parallelism."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from losa_runtime.layers.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x_TC: Tensor) -> Tensor:
        """x [T, C] -> [T, C]."""
        return self.down_proj(F.silu(self.gate_proj(x_TC)) * self.up_proj(x_TC))

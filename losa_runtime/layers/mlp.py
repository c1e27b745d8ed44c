"""The gated feed-forward layer of Llama-like models. Knows no model and no parallelism."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        """x [T, C] -> [T, C]."""
        return self.down_proj(F.silu(self.gate_proj(x_TC)) * self.up_proj(x_TC))

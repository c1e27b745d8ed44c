"""Projections, norms and rotation around an attention that is handed in. Knows no mask, no cache and no model.

Shape letters: T tokens, H query heads, G KV heads, D head dim, C hidden, F rotated channels.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from losa_runtime.core.model_config import ModelConfig
from losa_runtime.layers.linear import Linear
from losa_runtime.layers.norm import RMSNorm
from losa_runtime.layers.rope import rotate


class AttendFn(Protocol):
    """All that a model sees of attention."""

    def __call__(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """Attention output [T, H, D] of one layer for rotated queries and keys of the batch's T rows."""
        ...


class QwenAttention(nn.Module):
    """Grouped-query attention as in Qwen2 (biases on q, k, v) and Qwen3 (norms per head before the rotation)."""

    def __init__(self, config: ModelConfig, layer: int, biases: bool, head_norms: bool) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width, biases)
        self.k_proj = Linear(config.hidden_size, kv_width, biases)
        self.v_proj = Linear(config.hidden_size, kv_width, biases)
        self.o_proj = Linear(width, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if head_norms else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if head_norms else nn.Identity()

    def forward(self, x_TC: Tensor, cos_TF: Tensor, sin_TF: Tensor, attend: AttendFn) -> Tensor:
        """x [T, C] -> [T, C]."""
        T = x_TC.shape[0]
        q_THD = self.q_norm(self.q_proj(x_TC).view(T, -1, self.head_dim))
        k_TGD = self.k_norm(self.k_proj(x_TC).view(T, -1, self.head_dim))
        v_TGD = self.v_proj(x_TC).view(T, -1, self.head_dim)
        out_THD = attend(self.layer, rotate(q_THD, cos_TF, sin_TF), rotate(k_TGD, cos_TF, sin_TF), v_TGD)
        return self.o_proj(out_THD.reshape(T, -1))

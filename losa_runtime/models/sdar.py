"""SDAR and TraDo: a Qwen3 dense decoder trained to fill blocks; logits belong to their own position.

Per layer: RMSNorm, q/k/v without biases, RMSNorm per head on q and k before RoPE, grouped-query attention, output
projection, residual; RMSNorm, SwiGLU, residual. Knows no mask: attention is the callable it is handed.
Shape letters as in `model.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from losa_runtime.core.model_config import ModelConfig
from losa_runtime.layers.linear import Linear, linear
from losa_runtime.layers.mlp import SwiGLU
from losa_runtime.layers.norm import RMSNorm
from losa_runtime.layers.rope import RotaryEmbedding, rotate
from losa_runtime.models.model import AttendFn, BlockDiffusionModel


class SDARAttention(nn.Module):
    """Projections, per-head norms and rotation around the handed-in attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width)
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(width, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x_TC: Tensor, cos_TE: Tensor, sin_TE: Tensor, attend: AttendFn) -> Tensor:
        """x [T, C] -> [T, C]."""
        T = x_TC.shape[0]
        q_THD = self.q_norm(self.q_proj(x_TC).view(T, -1, self.head_dim))
        k_TGD = self.k_norm(self.k_proj(x_TC).view(T, -1, self.head_dim))
        v_TGD = self.v_proj(x_TC).view(T, -1, self.head_dim)
        out_THD = attend(self.layer, rotate(q_THD, cos_TE, sin_TE), rotate(k_TGD, cos_TE, sin_TE), v_TGD)
        return self.o_proj(out_THD.reshape(T, -1))


class SDARLayer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SDARAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x_TC: Tensor, cos_TE: Tensor, sin_TE: Tensor, attend: AttendFn) -> Tensor:
        """x [T, C] -> [T, C]."""
        x_TC = x_TC + self.self_attn(self.input_layernorm(x_TC), cos_TE, sin_TE, attend)
        return x_TC + self.mlp(self.post_attention_layernorm(x_TC))


class SDARBody(nn.Module):
    """Embedding, layers and final norm, named as in the checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        nothing = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(nothing, freeze=False)
        self.layers = nn.ModuleList(SDARLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class SDARForCausalLM(BlockDiffusionModel):
    """The model; parameter names are those of the released checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.model = SDARBody(config)
        self.rope = RotaryEmbedding(
            config.head_dim, config.rope_theta, config.rope_scaling, config.original_context, config.max_context
        )
        self.lm_head: Linear | None = None
        if config.tie_word_embeddings:
            self.tied = {"lm_head.weight": "model.embed_tokens.weight"}
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: AttendFn) -> Tensor:
        """See `BlockDiffusionModel.forward`."""
        cos_TE, sin_TE = self.rope(positions_T)
        x_TC = self.model.embed_tokens(tokens_T)
        for layer in self.model.layers:
            x_TC = layer(x_TC, cos_TE, sin_TE, attend)
        return self.model.norm(x_TC)

    def logits(self, hidden_RC: Tensor) -> Tensor:
        """See `BlockDiffusionModel.logits`."""
        head = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return linear(hidden_RC, head, self.row_tile).float()

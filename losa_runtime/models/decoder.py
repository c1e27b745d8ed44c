"""The decoder that families with Qwen's layers share; a family says how its attention and feed-forward layers differ.

Per layer: RMSNorm, attention, residual; RMSNorm, feed-forward layer, residual. Parameter names are those of Qwen's
checkpoints. Shape letters as in `model.py`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from losa_runtime.core.model_config import ModelConfig
from losa_runtime.layers.attention import AttendFn, QwenAttention
from losa_runtime.layers.linear import Linear, linear
from losa_runtime.layers.mixture import SparseMLP
from losa_runtime.layers.mlp import SwiGLU
from losa_runtime.layers.norm import RMSNorm
from losa_runtime.layers.rope import RotaryEmbedding
from losa_runtime.models.model import BlockDiffusionModel


def empty_embedding(config: ModelConfig) -> nn.Embedding:
    """An embedding whose weights are to be loaded."""
    return nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)


def feed_forward(config: ModelConfig, layer: int) -> nn.Module:
    """Experts where the configuration has them, else one gated layer."""
    if config.experts is None or layer in config.experts.dense_layers:
        return SwiGLU(config.hidden_size, config.intermediate_size)
    return SparseMLP(config.hidden_size, config.experts)


def rotary_embedding(config: ModelConfig) -> RotaryEmbedding:
    """The tables for the part of a head that is rotated."""
    scaling, original = config.rope_scaling, config.original_context
    return RotaryEmbedding(config.rotated, config.rope_theta, scaling, original, config.max_context)


class DecoderLayer(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: ModelConfig, layer: int, biases: bool, head_norms: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = QwenAttention(config, layer, biases, head_norms)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = feed_forward(config, layer)

    def forward(self, x_TC: Tensor, cos_TF: Tensor, sin_TF: Tensor, attend: AttendFn) -> Tensor:
        """x [T, C] -> [T, C]."""
        x_TC = x_TC + self.self_attn(self.input_layernorm(x_TC), cos_TF, sin_TF, attend)
        return x_TC + self.mlp(self.post_attention_layernorm(x_TC))


class DecoderBody(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig, biases: bool, head_norms: bool) -> None:
        super().__init__()
        self.embed_tokens = empty_embedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i, biases, head_norms) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DecoderModel(BlockDiffusionModel):
    """The model. biases: on q, k and v. head_norms: of q and k, before the rotation."""

    biases: ClassVar[bool] = False
    head_norms: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.model = DecoderBody(config, self.biases, self.head_norms)
        self.rope = rotary_embedding(config)
        self.lm_head: Linear | None = None
        if config.tie_word_embeddings:
            self.tied = {"lm_head.weight": "model.embed_tokens.weight"}
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: AttendFn) -> Tensor:
        """See `BlockDiffusionModel.forward`."""
        cos_TF, sin_TF = self.rope(positions_T)
        x_TC = self.model.embed_tokens(tokens_T)
        for layer in self.model.layers:
            x_TC = layer(x_TC, cos_TF, sin_TF, attend)
        return self.model.norm(x_TC)

    def logits(self, hidden_RC: Tensor) -> Tensor:
        """See `BlockDiffusionModel.logits`."""
        head = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return linear(hidden_RC, head, self.row_tile).float()

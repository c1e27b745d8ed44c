"""LLaDA2.0 and 2.1: a decoder with experts; logits belong to their own position.

Per layer: RMSNorm, one projection for q, k and v (side by side, without biases), RMSNorm per head on q and k, rotation
of the first channels of each head, grouped-query attention, output projection, residual; RMSNorm, feed-forward layer,
residual. The first layers have one gated layer, the others a biased sigmoid router over groups of experts and an
expert for every token. Shape letters as in `model.py`.
"""

from __future__ import annotations

from torch import Tensor, nn

from losa_runtime.core.model_config import ModelConfig
from losa_runtime.layers.attention import AttendFn
from losa_runtime.layers.linear import Linear, linear
from losa_runtime.layers.norm import RMSNorm
from losa_runtime.layers.rope import rotate
from losa_runtime.models.decoder import empty_embedding, feed_forward, rotary_embedding
from losa_runtime.models.model import BlockDiffusionModel


class LLaDA2Attention(nn.Module):
    """Fused projection, norms per head and partial rotation around the handed-in attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.query_key_value = Linear(config.hidden_size, sum(self.heads) * config.head_dim)
        self.query_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.dense = Linear(config.num_heads * config.head_dim, config.hidden_size)

    def forward(self, x_TC: Tensor, cos_TF: Tensor, sin_TF: Tensor, attend: AttendFn) -> Tensor:
        """x [T, C] -> [T, C]."""
        T = x_TC.shape[0]
        q_THD, k_TGD, v_TGD = self.query_key_value(x_TC).view(T, -1, self.head_dim).split(self.heads, dim=1)
        q_THD = rotate(self.query_layernorm(q_THD), cos_TF, sin_TF)
        k_TGD = rotate(self.key_layernorm(k_TGD), cos_TF, sin_TF)
        out_THD = attend(self.layer, q_THD, k_TGD, v_TGD.contiguous())
        return self.dense(out_THD.reshape(T, -1))


class LLaDA2Layer(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = LLaDA2Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = feed_forward(config, layer)

    def forward(self, x_TC: Tensor, cos_TF: Tensor, sin_TF: Tensor, attend: AttendFn) -> Tensor:
        """x [T, C] -> [T, C]."""
        x_TC = x_TC + self.attention(self.input_layernorm(x_TC), cos_TF, sin_TF, attend)
        return x_TC + self.mlp(self.post_attention_layernorm(x_TC))


class LLaDA2Body(nn.Module):
    """Embedding, layers and final norm, named as in the checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = empty_embedding(config)
        self.layers = nn.ModuleList(LLaDA2Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LLaDA2MoeModelLM(BlockDiffusionModel):
    """The model; parameter names are those of the released checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.model = LLaDA2Body(config)
        self.rope = rotary_embedding(config)
        self.lm_head: Linear | None = None
        if config.tie_word_embeddings:
            self.tied = {"lm_head.weight": "model.word_embeddings.weight"}
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: AttendFn) -> Tensor:
        """See `BlockDiffusionModel.forward`."""
        cos_TF, sin_TF = self.rope(positions_T)
        x_TC = self.model.word_embeddings(tokens_T)
        for layer in self.model.layers:
            x_TC = layer(x_TC, cos_TF, sin_TF, attend)
        return self.model.norm(x_TC)

    def logits(self, hidden_RC: Tensor) -> Tensor:
        """See `BlockDiffusionModel.logits`."""
        head = self.model.word_embeddings.weight if self.lm_head is None else self.lm_head.weight
        return linear(hidden_RC, head, self.row_tile).float()

"""Sizes for checkpoints with random weights. Plain numbers: importing this loads no torch.

`tiny` runs in milliseconds and has head_dim * heads different from hidden_size, as some released models do. The others
have the shapes of released models, for measuring speed and memory without a download. Whatever a family needs beside a
size, its experts for one, is in `FAMILY_FIELDS`; the sizes of one family's models only name it.
"""

from __future__ import annotations

_LARGE: dict[str, object] = {
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "block_size": 4,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def _large(hidden: int, intermediate: int, layers: int, heads: int, tied: bool = False) -> dict[str, object]:
    shape: dict[str, object] = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return {**_LARGE, **shape, "tie_word_embeddings": tied}


# preset name -> config.json fields
PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "block_size": 16,
        "tie_word_embeddings": False,
        "dtype": "float32",
    },
    "0.6b": _large(1024, 3072, 28, 16, tied=True),
    "1.7b": _large(2048, 6144, 28, 16),
    "4b": _large(2560, 9728, 36, 32),
    "8b": _large(4096, 12288, 36, 32),
    "30b-a3b": {**_large(2048, 6144, 48, 32), "num_key_value_heads": 4}
    | {"architecture": "SDARMoeForCausalLM", "num_experts": 128, "num_experts_per_tok": 8}
    | {"moe_intermediate_size": 768},
    "llada2-mini": {**_large(2048, 5120, 20, 16), "num_key_value_heads": 4, "vocab_size": 157184}
    | {"architecture": "LLaDA2MoeModelLM", "rope_theta": 600000.0, "block_size": 32}
    | {"num_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "moe_intermediate_size": 512},
}

_FEW_EXPERTS: dict[str, object] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
# architecture -> config.json fields beside those of a size, with values for small models
FAMILY_FIELDS: dict[str, dict[str, object]] = {
    "SDARForCausalLM": {"model_type": "sdar", "attention_bias": False},
    "SDARMoeForCausalLM": {
        "model_type": "sdar_moe",
        "attention_bias": False,
        **_FEW_EXPERTS,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "LLaDA2MoeModelLM": {
        "model_type": "llada2_moe",
        **_FEW_EXPERTS,
        "n_group": 4,
        "topk_group": 2,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
        "use_bias": False,
        "use_qkv_bias": False,
        "norm_head": False,
    },
    "Fast_dLLM_QwenForCausalLM": {"model_type": "Fast_dLLM_Qwen"},
    "A2DQwen3LMHeadModel": {"model_type": "a2d-qwen3", "attention_bias": False},
}

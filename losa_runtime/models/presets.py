"""Sizes for checkpoints with random weights. Plain numbers: importing this loads no torch.

`tiny` runs in milliseconds and has head_dim * heads different from hidden_size, as some released models do. The others
have the shapes of Qwen3 backbones, for measuring speed and memory without a download.
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
}

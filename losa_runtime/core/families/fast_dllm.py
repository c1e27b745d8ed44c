"""Fast-dLLM v2: Qwen2.5's fields; the block length is called `bd_size`, and heads fill the hidden size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from losa_runtime.core.config_file import refusal, whole_number
from losa_runtime.core.families.family import KEYS, Family


def read(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The head dim, which Qwen2's files need not name."""
    if raw.get("head_dim") is not None:
        return {}
    hidden, heads = (whole_number(path, raw, field, 1) for field in ("hidden_size", "num_attention_heads"))
    if hidden % heads:
        raise refusal(path, "hidden_size", hidden, f"a multiple of num_attention_heads = {heads}, or a head_dim")
    return {"head_dim": hidden // heads}


FAMILY = Family(
    block_length=32,
    mask_token_id=151665,
    only={"attention_bias": (True,), "partial_rotary_factor": (1, 1.0)},
    keys={**KEYS, "block_length": "bd_size"},
    read=read,
)

"""SDAR and TraDo: Qwen3's fields and the block length, which their files may leave out."""

from __future__ import annotations

from losa_runtime.core.families.family import Family

FAMILY = Family(
    block_length=4,
    mask_token_id=151669,
    only={"attention_bias": (False,), "partial_rotary_factor": (1, 1.0)},
)

"""SDAR with experts: Qwen3-MoE's fields beside those of SDAR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from losa_runtime.core.config_file import refusal, whole_number, whole_numbers
from losa_runtime.core.families.family import KEYS, Family


def read(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The experts. A layer has them if its number, counted from 1, is a multiple of `decoder_sparse_step` and it is
    not among `mlp_only_layers`."""
    layers = whole_number(path, raw, "num_hidden_layers", 1)
    every = whole_number(path, raw, "decoder_sparse_step", 1, default=1)
    without = whole_numbers(path, raw, "mlp_only_layers", default=())
    if any(layer >= layers for layer in without):
        raise refusal(path, "mlp_only_layers", list(without), f"layers below num_hidden_layers = {layers}")
    dense = tuple(i for i in range(layers) if i in without or (i + 1) % every)
    fields = {"count": "num_experts", "per_token": "num_experts_per_tok", "width": "moe_intermediate_size"}
    experts = {field: raw[key] for field, key in fields.items() if raw.get(key) is not None}
    return {"experts": {**experts, "normalise": raw.get("norm_topk_prob", False), "dense_layers": dense}}


FAMILY = Family(
    block_length=4,
    mask_token_id=151669,
    only={"attention_bias": (False,), "partial_rotary_factor": (1, 1.0)},
    keys={
        **KEYS,
        "count": "num_experts",
        "per_token": "num_experts_per_tok",
        "width": "moe_intermediate_size",
        "normalise": "norm_topk_prob",
    },
    read=read,
)

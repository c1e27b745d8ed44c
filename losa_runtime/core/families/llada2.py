"""LLaDA2.0 and 2.1: experts chosen in groups by a biased sigmoid router, rotation of a part of each head.

The block length stands in no file; it is a default of the published generation loops. LLaDA2.2 chooses experts per
block and edits with two further tokens: that is another network, refused by its fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from losa_runtime.core.config_file import refusal, whole_number
from losa_runtime.core.errors import CheckpointError
from losa_runtime.core.families.family import KEYS, Family

_EDITING = ("delete_token_id", "split_token_id")
_EXPERTS = {
    "count": "num_experts",
    "per_token": "num_experts_per_tok",
    "width": "moe_intermediate_size",
    "normalise": "norm_topk_prob",
    "scaling": "routed_scaling_factor",
    "groups": "n_group",
    "kept_groups": "topk_group",
    "bias": "moe_router_enable_expert_bias",
}


def read(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Experts and the rotated part of a head."""
    for field in _EDITING:
        if raw.get(field) is not None:
            raise CheckpointError(
                f"{path}: {field}: found {raw[field]!r}, allowed: none (LLaDA2.2 chooses its experts per block, which "
                "is not implemented; LLaDA2.0 and 2.1 are)"
            )
    layers = whole_number(path, raw, "num_hidden_layers", 1)
    dense = whole_number(path, raw, "first_k_dense_replace", 0, default=0)
    if dense > layers:
        raise refusal(path, "first_k_dense_replace", dense, f"at most num_hidden_layers = {layers}")
    width = whole_number(path, raw, "moe_intermediate_size", 1)
    experts = {field: raw[key] for field, key in _EXPERTS.items() if raw.get(key) is not None}
    for field in ("bias", "normalise"):
        experts.setdefault(field, True)
    shared = whole_number(path, raw, "num_shared_experts", 0, default=0)
    experts |= {"score": "sigmoid", "shared_width": shared * width, "dense_layers": tuple(range(dense))}
    return {"experts": experts, "rotary_dim": _rotary_dim(path, raw)}


def _rotary_dim(path: Path, raw: dict[str, Any]) -> int:
    """From `partial_rotary_factor` or `rotary_dim`, which must agree where both are there."""
    head = whole_number(path, raw, "head_dim", 2)
    share, given = raw.get("partial_rotary_factor"), raw.get("rotary_dim")
    if share is None and given is None:
        raise refusal(path, "partial_rotary_factor", None, "the share of a head that is rotated, or a rotary_dim")
    if share is not None and (not isinstance(share, int | float) or not 0 < share <= 1 or head * share % 2):
        raise refusal(path, "partial_rotary_factor", share, f"a share of head_dim = {head} that is an even number")
    if share is not None and given not in (None, head * share):
        raise refusal(path, "rotary_dim", given, f"head_dim * partial_rotary_factor = {head * share:g}")
    return int(head * share) if share is not None else whole_number(path, raw, "rotary_dim", 2)


FAMILY = Family(
    block_length=32,
    mask_token_id=156895,
    only={
        "attention_bias": (False,),
        "use_bias": (False,),
        "use_qkv_bias": (False,),
        "use_qk_norm": (True,),
        "norm_head": (False,),
        "score_function": ("sigmoid",),
        "num_nextn_predict_layers": (0,),
    },
    keys={**KEYS, **_EXPERTS, "shared_width": "num_shared_experts"},
    read=read,
)

"""What a model family is to the reader of a configuration. Knows no member."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Only = Mapping[str, tuple[object, ...]]

# Fields that change what any of the networks computes, with the values under which it is what is implemented here.
PLAIN: Only = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "use_regular_causal": (False,),
    "quantization_config": (),
    "right_shift_logits": (False,),
}
# config.json key of each field of ModelConfig whose name differs.
KEYS: Mapping[str, str] = {
    "architecture": "architectures",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "block_length": "block_size",
    "eos_token_ids": "eos_token_id",
}


def nothing_more(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """A family without fields of its own."""
    return {}


class Family(NamedTuple):
    """How one family's configuration is read.

    block_length, mask_token_id: of the released checkpoints, for files that name none; None = the tokenizer says it.
    only: fields that change the network, with the allowed values, beside `PLAIN`. keys: field of ModelConfig (or
    ExpertConfig) -> key in config.json, where they differ. read: the values of further fields of ModelConfig, from the
    file's path (for errors) and content; raises CheckpointError. grids: where its models may count blocks from, see
    EngineConfig.
    """

    block_length: int
    mask_token_id: int | None
    only: Only
    keys: Mapping[str, str] = KEYS
    read: Callable[[Path, dict[str, Any]], dict[str, Any]] = nothing_more
    grids: tuple[str, ...] = ("start",)

"""How positions are encoded, from the spellings that config.json has for it. Knows no tensor library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from losa_runtime.core.config import RopeScaling
from losa_runtime.core.config_file import MISSING, first_of, in_words, refusal

# Keys of a scaling dictionary beside the kind and the base; `truncate` is honoured only in its default.
_SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}


def read_rope(path: Path, raw: dict[str, Any], partial: float = 1) -> tuple[Any, RopeScaling | None]:
    """Base and scaling, from `rope_theta` and `rope_scaling` or from the newer `rope_parameters`.

    partial: the share of a head that is rotated, which the newer spelling repeats. The base is MISSING if there is
    none. Raises CheckpointError.
    """
    field = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    data = raw.get(field)
    if isinstance(data, dict) and isinstance(data.get("full_attention"), dict):
        data = data["full_attention"]
    if data is not None and not isinstance(data, dict):
        raise refusal(path, field, data, "an object or null")
    data = dict(data or {})
    theta = first_of(data.pop("rope_theta", None), raw.get("rope_theta"), MISSING)
    if theta is not MISSING and raw.get("rope_theta") not in (None, theta):
        raise refusal(path, "rope_theta", raw["rope_theta"], f"the same as in {field}, {theta}")
    kinds = {k for k in (data.pop("rope_type", None), data.pop("type", None)) if k is not None}
    if len(kinds) > 1:
        raise refusal(path, field, sorted(map(str, kinds)), "rope_type and type that agree")
    kind = kinds.pop() if kinds else "default"
    if data.get("partial_rotary_factor") in (None, partial):
        data.pop("partial_rotary_factor", None)
    if kind == "default":
        if data.pop("partial_rotary_factor", partial) != partial or data.pop("factor", 1) != 1:
            raise refusal(path, field, raw[field], "no factor without a rope_type of linear or yarn")
        return theta, None
    if kind not in _SCALING_KEYS:
        raise refusal(path, f"{field}.rope_type", kind, "default, linear or yarn")
    if data.get("truncate") in (None, True):
        data.pop("truncate", None)
    data = {k: v for k, v in data.items() if v is not None}
    unknown = sorted(set(data) - set(_SCALING_KEYS[kind]))
    if unknown:
        raise refusal(
            path, f"{field}.{unknown[0]}", data[unknown[0]], f"for {kind} only {', '.join(_SCALING_KEYS[kind])}"
        )
    try:
        return theta, RopeScaling.model_validate({"kind": kind, **data})
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        where = ".".join([field, *map(str, first["loc"])])
        found = None if first["type"] == "missing" else first["input"]
        raise refusal(path, where, found, in_words(first["msg"])) from None

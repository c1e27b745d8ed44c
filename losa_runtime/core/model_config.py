"""What a checkpoint folder says about its model, read once and checked field by field.

This room turns `config.json` and `generation_config.json` into one frozen value and refuses, by name and with the
reason, whatever the runtime cannot serve. It opens no weights, knows no tensor library and does not know which
classes implement a family (`losa_runtime.models.model` does).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from losa_runtime.core.architectures import REFUSED_ARCHITECTURES, SUPPORTED
from losa_runtime.core.config import RopeScaling
from losa_runtime.core.errors import CheckpointError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"


# Fields that change what the network computes, with the values under which it is the network implemented here.
_ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "use_regular_causal": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
}
# config.json key of each field whose name differs here.
_KEYS = {
    "architecture": "architectures",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "block_length": "block_size",
    "eos_token_ids": "eos_token_id",
}
_COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("rms_norm_eps", "max_position_embeddings"),
)
# Keys of a scaling dictionary beside the kind and the base; `truncate` is honoured only in its default.
_SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}


class ModelConfig(BaseModel):
    """Shape and special ids of a block-diffusion model.

    block_length: positions per diffusion block. mask_token_id: id of an open position. eos_token_ids: every id that
    ends generation. dtype: of the checkpoint's tensors. rope_scaling None means plain RoPE.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    architecture: str
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, multiple_of=2)
    rms_norm_eps: float = Field(gt=0, lt=1)
    rope_theta: float = Field(gt=1, allow_inf_nan=False)
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = Field(gt=0)
    tie_word_embeddings: bool = False
    block_length: int = Field(gt=0, le=1024)
    mask_token_id: int = Field(ge=0)
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = Field(default=None, ge=0)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @field_validator("num_kv_heads")
    @classmethod
    def _divides_heads(cls, value: int, info: ValidationInfo) -> int:
        heads = info.data.get("num_heads")
        if heads is not None and heads % value:
            raise ValueError(f"a divisor of num_attention_heads = {heads}")
        return value

    @field_validator("mask_token_id", "pad_token_id", "eos_token_ids")
    @classmethod
    def _inside_vocabulary(cls, value: Any, info: ValidationInfo) -> Any:
        size = info.data.get("vocab_size")
        ids = value if isinstance(value, tuple) else () if value is None else (value,)
        if size is not None and any(not 0 <= i < size for i in ids):
            raise ValueError(f"ids inside the vocabulary, 0 .. {size - 1}")
        return value

    @property
    def max_context(self) -> int:
        """Longest sequence in tokens for which the position encoding is defined."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        return int(self.original_context * self.rope_scaling.factor)

    @property
    def original_context(self) -> int:
        """Length in tokens to which RoPE scaling refers: the one before any stretching."""
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "yarn" and scaling.original_max_position_embeddings is not None:
            return scaling.original_max_position_embeddings
        return self.max_position_embeddings

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        block_length: int | None = None,
        mask_token_id: int | None = None,
        rope_scaling: RopeScaling | None = None,
    ) -> ModelConfig:
        """Read a checkpoint folder; the three options override its files.

        Raises CheckpointError naming file, field, what was found and what is allowed.
        """
        folder = Path(folder)
        return cls.from_dict(
            read_json(folder / CONFIG_FILE),
            read_json(folder / GENERATION_FILE) if (folder / GENERATION_FILE).is_file() else {},
            folder,
            block_length=block_length,
            mask_token_id=mask_token_id,
            rope_scaling=rope_scaling,
        )

    @classmethod
    def from_dict(
        cls,
        raw: dict[str, Any],
        generation: dict[str, Any],
        folder: Path,
        *,
        block_length: int | None = None,
        mask_token_id: int | None = None,
        rope_scaling: RopeScaling | None = None,
    ) -> ModelConfig:
        """As `from_folder`, with the content of both files at hand; folder is only named in errors."""
        path, generation_path = folder / CONFIG_FILE, folder / GENERATION_FILE
        architecture = _architecture(path, raw)
        _refuse_variants(path, raw)
        theta, scaling = _rope(path, raw)
        defaults = SUPPORTED[architecture]
        values: dict[str, Any] = {field: raw[key] for field in _COPIED if (key := _KEYS.get(field, field)) in raw}
        values |= {
            "architecture": architecture,
            "rope_theta": theta,
            "rope_scaling": rope_scaling or scaling,
            "tie_word_embeddings": raw.get("tie_word_embeddings", False),
            "block_length": _first(block_length, raw.get("block_size"), raw.get("block_length"), defaults.block_length),
            "mask_token_id": _first(mask_token_id, raw.get("mask_token_id"), defaults.mask_token_id),
            "eos_token_ids": _eos_ids((generation_path, generation), (path, raw)),
            "pad_token_id": _first(generation.get("pad_token_id"), raw.get("pad_token_id")),
            "dtype": str(_first(raw.get("dtype"), raw.get("torch_dtype"), "float32")).removeprefix("torch."),
        }
        sources = {"block_length": block_length, "mask_token_id": mask_token_id}
        try:
            return cls(**{k: v for k, v in values.items() if v is not MISSING})
        except ValidationError as error:
            first: Any = error.errors(include_url=False)[0]
            field = str(first["loc"][0])
            given = sources.get(field) is not None
            key = _KEYS.get(field, field)
            origin = f"{path} or {GENERATION_FILE}" if generation.get(key) is not None else str(path)
            where = f"option {field}" if given else f"{origin}: {key}"
            found = "nothing" if first["type"] == "missing" else repr(first["input"])
            allowed = _allowed(first["msg"])
            if field == "mask_token_id" and not given and raw.get("mask_token_id") is None:
                allowed += " (the file names no mask_token_id, so the family's default was used; give the option)"
            raise CheckpointError(f"{where}: found {found}, allowed: {allowed}") from None


MISSING: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when there is no such file or it holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: found a JSON {type(data).__name__}, allowed: an object")
    return data


def _refuse(path: Path, field: str, found: object, allowed: str) -> CheckpointError:
    return CheckpointError(f"{path}: {field}: found {found!r}, allowed: {allowed}")


def _allowed(message: str) -> str:
    if message == "Field required":
        return "a value (the field is required)"
    return message.removeprefix("Value error, ").removeprefix("Input should be ")


def _first(*candidates: Any) -> Any:
    return next((c for c in candidates if c is not None), None)


def _architecture(path: Path, raw: dict[str, Any]) -> str:
    listed = raw.get("architectures")
    allowed = " or ".join(SUPPORTED)
    if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], str):
        raise _refuse(path, "architectures", listed, f"a list with one name, {allowed}")
    name: str = listed[0]
    if name not in SUPPORTED:
        reason = REFUSED_ARCHITECTURES.get(name, "not a model family that this runtime knows")
        raise CheckpointError(f"{path}: architectures: {name} is {reason}. Allowed: {allowed}")
    return name


def _refuse_variants(path: Path, raw: dict[str, Any]) -> None:
    for field, allowed in _ONLY.items():
        value = raw.get(field)
        if value is not None and value not in allowed:
            words = " or ".join(json.dumps(a) for a in allowed) or "none (only plain weights can be loaded)"
            raise _refuse(path, field, value, words)
    kinds = raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(kinds) - {"full_attention"}):
        raise _refuse(path, "layer_types", kinds, "only full_attention layers")
    sizes = (raw.get("block_size"), raw.get("block_length"))
    if None not in sizes and sizes[0] != sizes[1]:
        raise _refuse(path, "block_length", sizes[1], f"the same as block_size = {sizes[0]!r}")


def _rope(path: Path, raw: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """Base and scaling, from `rope_theta` and `rope_scaling` or from the newer `rope_parameters`."""
    field = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    data = raw.get(field)
    if isinstance(data, dict) and isinstance(data.get("full_attention"), dict):
        data = data["full_attention"]
    if data is not None and not isinstance(data, dict):
        raise _refuse(path, field, data, "an object or null")
    data = dict(data or {})
    theta = _first(data.pop("rope_theta", None), raw.get("rope_theta"), MISSING)
    if theta is not MISSING and raw.get("rope_theta") not in (None, theta):
        raise _refuse(path, "rope_theta", raw["rope_theta"], f"the same as in {field}, {theta}")
    kinds = {k for k in (data.pop("rope_type", None), data.pop("type", None)) if k is not None}
    if len(kinds) > 1:
        raise _refuse(path, field, sorted(map(str, kinds)), "rope_type and type that agree")
    kind = kinds.pop() if kinds else "default"
    if kind == "default":
        if data.pop("partial_rotary_factor", 1) != 1 or data.pop("factor", 1) != 1:
            raise _refuse(path, field, raw[field], "no factor without a rope_type of linear or yarn")
        return theta, None
    if kind not in _SCALING_KEYS:
        raise _refuse(path, f"{field}.rope_type", kind, "default, linear or yarn")
    for neutral in ("truncate", "partial_rotary_factor"):
        if data.get(neutral) in (None, True, 1):
            data.pop(neutral, None)
    data = {k: v for k, v in data.items() if v is not None}
    unknown = sorted(set(data) - set(_SCALING_KEYS[kind]))
    if unknown:
        raise _refuse(
            path, f"{field}.{unknown[0]}", data[unknown[0]], f"for {kind} only {', '.join(_SCALING_KEYS[kind])}"
        )
    try:
        return theta, RopeScaling.model_validate({"kind": kind, **data})
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        where = ".".join([field, *map(str, first["loc"])])
        found = None if first["type"] == "missing" else first["input"]
        raise _refuse(path, where, found, _allowed(first["msg"])) from None


def _eos_ids(*sources: tuple[Path, dict[str, Any]]) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for path, raw in sources:
        value = raw.get("eos_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int for i in listed):
            raise _refuse(path, "eos_token_id", value, "an integer or a list of integers")
        ids.update(dict.fromkeys(listed))
    return tuple(ids)

"""What a checkpoint folder says about its model, read once and checked field by field.

This room turns `config.json` and `generation_config.json` into one frozen value and refuses, by name and with the
reason, whatever the runtime cannot serve. What is particular to a family stands in its file of
`losa_runtime.core.families`. It opens no weights, knows no tensor library and does not know which classes implement a
family (`losa_runtime.models.model` does).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from losa_runtime.core.architectures import REFUSED_ARCHITECTURES, SUPPORTED
from losa_runtime.core.config import RopeScaling
from losa_runtime.core.config_file import (
    CONFIG_FILE,
    GENERATION_FILE,
    MISSING,
    SETTINGS_FILE,
    TOKENIZER_FILE,
    first_of,
    in_words,
    read_json,
    refusal,
)
from losa_runtime.core.errors import CheckpointError
from losa_runtime.core.expert_config import ExpertConfig
from losa_runtime.core.families.family import PLAIN, Family
from losa_runtime.core.rope_config import read_rope

_COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("rms_norm_eps", "max_position_embeddings"),
)
_BLOCK_KEYS = ("block_size", "block_length", "bd_size")


class ModelConfig(BaseModel):
    """Shape and special ids of a block-diffusion model.

    block_length: positions per diffusion block. mask_token_id: id of an open position. eos_token_ids: every id that
    ends generation. dtype: of the checkpoint's tensors. rope_scaling None means plain RoPE. rotary_dim: leading part of
    a head that is rotated, None = all of it. experts: None for a dense model.
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
    rotary_dim: int | None = Field(default=None, gt=0, multiple_of=2)
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
    experts: ExpertConfig | None = None

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

    @field_validator("rotary_dim")
    @classmethod
    def _part_of_a_head(cls, value: int | None, info: ValidationInfo) -> int | None:
        head = info.data.get("head_dim")
        if value is not None and head is not None and value > head:
            raise ValueError(f"at most head_dim = {head}")
        return value

    @property
    def rotated(self) -> int:
        """Leading channels of each head that are rotated."""
        return self.rotary_dim or self.head_dim

    @property
    def widest_hidden(self) -> int:
        """Numbers that a token has in the hidden layer of any feed-forward layer, all of its experts together."""
        if self.experts is None:
            return self.intermediate_size
        return max(self.intermediate_size, self.experts.per_token * self.experts.width + self.experts.shared_width)

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
        family = SUPPORTED[architecture]
        _refuse_variants(path, raw, family)
        share = raw.get("partial_rotary_factor")
        theta, scaling = read_rope(path, raw, 1 if share is None else share)
        keys = family.keys
        values: dict[str, Any] = {f: raw[key] for f in _COPIED if raw.get(key := keys.get(f, f)) is not None}
        values |= family.read(path, raw)
        values |= {
            "architecture": architecture,
            "rope_theta": theta,
            "rope_scaling": rope_scaling or scaling,
            "tie_word_embeddings": first_of(raw.get("tie_word_embeddings"), False),
            "block_length": first_of(block_length, *(raw.get(key) for key in _BLOCK_KEYS), family.block_length),
            "mask_token_id": first_of(mask_token_id, declared_mask(folder, raw), MISSING),
            "eos_token_ids": _eos_ids((generation_path, generation), (path, raw)),
            "pad_token_id": first_of(generation.get("pad_token_id"), raw.get("pad_token_id")),
            "dtype": str(first_of(raw.get("dtype"), raw.get("torch_dtype"), "float32")).removeprefix("torch."),
        }
        options = {"block_length": block_length, "mask_token_id": mask_token_id}
        given = {field for field, value in options.items() if value is not None}
        try:
            return cls(**{k: v for k, v in values.items() if v is not MISSING})
        except ValidationError as error:
            first: Any = error.errors(include_url=False)[0]
            raise _named(first, path, raw, generation, family, given) from None


def declared_mask(folder: Path, raw: dict[str, Any]) -> int | None:
    """The mask's id: what config.json says, else the family's, else that of the token which the tokenizer calls its
    mask."""
    given = raw.get("mask_token_id")
    listed = raw.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    if given is not None or not isinstance(name, str) or name not in SUPPORTED:
        return given
    if SUPPORTED[name].mask_token_id is not None:
        return SUPPORTED[name].mask_token_id
    if not (folder / TOKENIZER_FILE).is_file() or not (folder / SETTINGS_FILE).is_file():
        return None
    text = read_json(folder / SETTINGS_FILE).get("mask_token")
    text = text.get("content") if isinstance(text, dict) else text
    added = read_json(folder / TOKENIZER_FILE).get("added_tokens")
    found = [t.get("id") for t in added or () if isinstance(t, dict) and t.get("content") == text]
    return found[0] if found else None


def _named(
    first: Any, path: Path, raw: dict[str, Any], generation: dict[str, Any], family: Family, given: set[str]
) -> CheckpointError:
    """The answer to a value that does not fit, with the name that it has where it comes from."""
    field = str([part for part in first["loc"] if isinstance(part, str)][-1])
    key = family.keys.get(field, field)
    origin = f"{path} or {GENERATION_FILE}" if generation.get(key) is not None else str(path)
    where = f"option {field}" if field in given else f"{origin}: {key}"
    found = "nothing" if first["type"] == "missing" else repr(first["input"])
    allowed = in_words(first["msg"])
    if field == "mask_token_id" and field not in given and raw.get("mask_token_id") is None:
        what = "and neither does the tokenizer" if found == "nothing" else "so the family's default was used"
        allowed += f" (the file names no mask_token_id, {what}; give the option)"
    return CheckpointError(f"{where}: found {found}, allowed: {allowed}")


def _architecture(path: Path, raw: dict[str, Any]) -> str:
    listed = raw.get("architectures")
    allowed = " or ".join(SUPPORTED)
    if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], str):
        raise refusal(path, "architectures", listed, f"a list with one name, {allowed}")
    name: str = listed[0]
    if name not in SUPPORTED:
        reason = REFUSED_ARCHITECTURES.get(name, "not a model family that this runtime knows")
        raise CheckpointError(f"{path}: architectures: {name} is {reason}. Allowed: {allowed}")
    return name


def _refuse_variants(path: Path, raw: dict[str, Any], family: Family) -> None:
    for field, allowed in {**PLAIN, **family.only}.items():
        value = raw.get(field)
        if value is not None and value not in allowed:
            words = " or ".join(json.dumps(a) for a in allowed) or "none (only plain weights can be loaded)"
            raise refusal(path, field, value, words)
    kinds = raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(kinds) - {"full_attention"}):
        raise refusal(path, "layer_types", kinds, "only full_attention layers")
    sizes = {key: raw[key] for key in _BLOCK_KEYS if raw.get(key) is not None}
    first = next(iter(sizes), "")
    for key, value in sizes.items():
        if value != sizes[first]:
            raise refusal(path, key, value, f"the same as {first} = {sizes[first]!r}")


def _eos_ids(*sources: tuple[Path, dict[str, Any]]) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for path, raw in sources:
        value = raw.get("eos_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int for i in listed):
            raise refusal(path, "eos_token_id", value, "an integer or a list of integers")
        ids.update(dict.fromkeys(listed))
    return tuple(ids)

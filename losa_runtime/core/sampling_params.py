"""What a request may ask of generation. Validated once, frozen afterwards.

Field names are SGLang's. What a block-diffusion model cannot honour yet is refused by name in `REFUSED`; a value of
null means the default for every field, as SGLang's clients expect.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from losa_runtime.core.errors import InvalidRequest, invalid_request

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_SAMPLES = 8
MAX_BIASES = 300
MAX_COUNT = 2**31 - 1  # of anything counted: far above sense, far below what overflows a tensor
MAX_LOGIT_BIAS = 1e4  # decides any softmax in float32 without overflowing it

# Known parameters that are refused unless they carry a value that asks for nothing. name -> (neutral values, reason)
_GRAMMAR = "null (constraints are regular: `regex` or `json_schema`)"
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "ebnf": ((None, ""), _GRAMMAR),
    "structural_tag": ((None, ""), _GRAMMAR),
    "stop_regex": ((None, "", [], ()), "null or an empty list (use `stop` or `stop_token_ids`)"),
    "spaces_between_special_tokens": ((None, True), "true or null (special tokens are joined as the tokenizer says)"),
    "beam_width": ((None, 0, 1), "null (there is no beam search over a block)"),
    "stream_interval": ((None, 1), "null or 1 (text is streamed once per finished block)"),
}


def _as_float(value: object) -> object:
    """JSON clients write whole numbers without a point. What no float can hold is left for the validator to refuse."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf


class DiffusionParams(BaseModel):
    """Per-request knobs of this runtime, sent as `sampling_params.custom_params`. None means the server's default.

    sparse_method: registry name of the sparse attention method, e.g. "dense", "quest", "losa".
    token_budget: prefix tokens each query may select (a multiple of the page size).
    active_tokens | active_ratio | active_tau: LoSA's active-row rule; at most one of the three.
    sparse_options: further options of the chosen method by name, e.g. {"dense_layers": 2}; see the method's `Options`.
    algorithm: registry name of the decoding algorithm.
    threshold: confidence above which the dynamic algorithm accepts a token.
    entropy_bound: nats of entropy that tokens accepted together may have in sum, for the entropy-bounded algorithm.
    edit_threshold: confidence above which joint_threshold replaces a token that it has accepted.
    post_edit_steps: most steps of a block that begin without a mask, for the same.
    neighbour_penalty: taken off the logit of the token on the left, for the same.
    preset: a name for values of these, as another engine has them; what is said beside it counts more. See
    `decoding.presets`.
    denoising_steps: planned denoising steps per block (1 .. block length); joint_threshold has no plan, so beside it
    they only count for a method that goes by them.
    sub_block_length: a block is filled in parts of so many positions from left to right; a divisor of the block length.
    grammar_mode: how a block is filled under `regex` or `json_schema`: along the most probable path ("map", the
    default: as good or better with the dynamic algorithm and with temperature, and cheaper), or hole by hole ("valid":
    better with few fixed greedy steps per block). The measurement is `benchmarks.grammar`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sparse_method: str | None = None
    token_budget: int | None = Field(default=None, gt=0, le=MAX_COUNT)
    active_tokens: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    active_ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    active_tau: float | None = Field(default=None, gt=0.0, le=1.0)
    sparse_options: dict[str, bool | int | float | str] | None = Field(default=None, max_length=64)
    algorithm: str | None = None
    threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    entropy_bound: float | None = Field(default=None, ge=0.0, le=1e6)
    edit_threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    post_edit_steps: int | None = Field(default=None, ge=0, le=1024)
    neighbour_penalty: float | None = Field(default=None, ge=0.0, le=1e4)
    preset: str | None = None
    denoising_steps: int | None = Field(default=None, gt=0, le=MAX_COUNT)
    sub_block_length: int | None = Field(default=None, gt=0, le=MAX_COUNT)
    grammar_mode: Literal["map", "valid"] | None = None

    @field_validator(
        *("active_ratio", "active_tau", "threshold", "entropy_bound", "edit_threshold", "neighbour_penalty"),
        mode="before",
    )
    @classmethod
    def _whole_numbers_are_floats(cls, value: object) -> object:
        return _as_float(value)

    @field_validator("sparse_options", mode="before")
    @classmethod
    def _options_have_simple_values(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        for name, found in value.items():
            if not isinstance(found, bool | int | float | str | None):
                allowed = "a number, a text, true or false"
                raise InvalidRequestValue(f"custom_params.sparse_options.{name}", found, allowed)
        return {name: found for name, found in value.items() if found is not None}

    @model_validator(mode="after")
    def _one_active_rule(self) -> Self:
        given = [n for n in ("active_tokens", "active_ratio", "active_tau") if getattr(self, n) is not None]
        if len(given) > 1:
            raise InvalidRequestValue(f"custom_params.{given[1]}", getattr(self, given[1]), f"absent beside {given[0]}")
        return self


class InvalidRequestValue(InvalidRequest, ValueError):
    """An InvalidRequest that pydantic may carry through a validator."""


class SamplingParams(BaseModel):
    """Sampling parameters of one request (SGLang's names and defaults).

    temperature 0 means greedy. top_k -1 means all. `max_new_tokens` None means up to the context length; 0 means
    prefill (and cache) only. regex, json_schema (a JSON text, or the object itself): what the whole output matches; at
    most one of them, and such an output never holds a stop string. `stop` and `stop_token_ids` accept a single value.
    Unknown keys are refused here; the HTTP layer drops keys that it does not know before it comes to this.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_new_tokens: int | None = Field(default=128, ge=0, le=MAX_COUNT)
    min_new_tokens: int = Field(default=0, ge=0, le=MAX_COUNT)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=-1, ge=-1, le=MAX_COUNT)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=2.0)
    logit_bias: dict[int, float] = Field(default_factory=dict, max_length=MAX_BIASES)
    sampling_seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = Field(default=(), max_length=256)
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    regex: str | None = None
    json_schema: str | None = None
    custom_params: DiffusionParams = DiffusionParams()

    @model_validator(mode="before")
    @classmethod
    def _nulls_and_refusals(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, (neutral, allowed) in REFUSED.items():
            if name in data and not any(data[name] is n or data[name] == n for n in neutral):
                raise InvalidRequestValue(f"sampling_params.{name}", data[name], allowed)
        keep_null = {"max_new_tokens", "sampling_seed"}
        return {k: v for k, v in data.items() if k not in REFUSED and (v is not None or k in keep_null)}

    @field_validator(
        "temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", mode="before"
    )
    @classmethod
    def _whole_numbers_are_floats(cls, value: object) -> object:
        return _as_float(value)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _json_keys_are_strings(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {
            int(k) if isinstance(k, str) and k.isdecimal() and len(k) < 12 else k: _as_float(v)
            for k, v in value.items()
        }

    @field_validator("logit_bias")
    @classmethod
    def _biases_that_float32_can_hold(cls, value: dict[int, float]) -> dict[int, float]:
        for token, bias in value.items():
            if not abs(bias) <= MAX_LOGIT_BIAS:
                raise ValueError(f"biases from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g} (token {token} has {bias!r})")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_or_many(cls, value: object) -> object:
        if isinstance(value, str):
            return (value,) if value else ()
        return tuple(value) if isinstance(value, list) else value

    @field_validator("stop")
    @classmethod
    def _stop_sizes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        value = tuple(s for s in value if s)
        if len(value) > MAX_STOP_STRINGS:
            raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings")
        if any(len(s) > MAX_STOP_LENGTH for s in value):
            raise ValueError(f"stop strings of at most {MAX_STOP_LENGTH} characters")
        return value

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _one_id_or_many(cls, value: object) -> object:
        if type(value) is int:
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("regex", "json_schema", mode="before")
    @classmethod
    def _empty_asks_for_nothing(cls, value: object) -> object:
        if isinstance(value, dict | bool):
            return json.dumps(value)
        return None if value == "" else value

    @field_validator("top_k")
    @classmethod
    def _top_k_not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("-1 (all) or at least 1")
        return value

    @model_validator(mode="after")
    def _min_below_max(self) -> Self:
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InvalidRequestValue(
                "sampling_params.min_new_tokens", self.min_new_tokens, f"at most max_new_tokens = {self.max_new_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _one_grammar_that_can_end(self) -> Self:
        field = "regex" if self.regex is not None else "json_schema"
        if getattr(self, field) is None:
            return self
        if self.regex is not None and self.json_schema is not None:
            raise InvalidRequestValue("sampling_params.json_schema", "a schema", "null beside `regex`")
        if self.ignore_eos:
            raise InvalidRequestValue(
                "sampling_params.ignore_eos", True, f"false: with `{field}` an output ends itself"
            )
        if self.no_stop_trim:
            allowed = f"false: with `{field}` nothing stands behind the match"
            raise InvalidRequestValue("sampling_params.no_stop_trim", True, allowed)
        if self.min_new_tokens:
            allowed = f"0: with `{field}` the pattern says how long an output is"
            raise InvalidRequestValue("sampling_params.min_new_tokens", self.min_new_tokens, allowed)
        return self

    @classmethod
    def parse(cls, data: dict[str, Any], where: str = "sampling_params") -> SamplingParams:
        """Validate a mapping. Raises InvalidRequest naming the field under `where`."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise invalid_request(where, error) from None

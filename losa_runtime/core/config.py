"""The engine's configuration: one frozen pydantic model. `auto` values are settled once, in `Engine`, and logged."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from losa_runtime.core.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16", "float16"]


class RopeScaling(BaseModel):
    """RoPE scaling beyond the trained length: linear interpolation, or YaRN (arXiv 2309.00071)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["linear", "yarn"]
    factor: float = Field(gt=1.0)
    original_max_position_embeddings: int | None = Field(default=None, gt=0)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    attention_factor: float | None = Field(default=None, gt=0)


class EngineConfig(BaseModel):
    """Everything that is fixed for the life of an engine.

    model: local checkpoint folder or hub id. tokenizer: folder, default the model's.
    dtype: of weights and activations; kv_cache_dtype: of the pages. auto = float32 on a CPU, the checkpoint's else.
    attention_backend: how attention is computed. auto = native where its kernels are built and the CPU has AVX2.
    page_size: tokens per K/V page. max_total_tokens: size of the page pool in tokens; None = from free memory times
    mem_fraction. context_length: longest prompt + output; None = the model's.
    chunked_prefill_size: prompt tokens prefilled per round over all requests.
    disable_fused_commit: store a finished block in a forward of its own, not together with the next block's first step.
    deterministic: bitwise equal logits whatever the batch, at a price: fixed tiles in every matrix product.
    schedule_policy: who is admitted first: first come, longest cached prefix, or highest `priority`.
    radix_eviction_policy: which unlocked prefix goes first: least recently or least frequently used.
    block_length, mask_token_id, rope_scaling: override the checkpoint's config.
    sparse_method … denoising_steps: defaults of `DiffusionParams`, see there. token_budget: None = 1024, or the context
    if that is shorter. sparse_methods: what requests may choose, None = any; only their page summaries and state take
    memory. sparse_options: of `sparse_method`; they are not for requests that choose another method.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    tokenizer: str | None = None
    served_model_name: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: DType = "auto"
    kv_cache_dtype: DType = "auto"
    attention_backend: Literal["auto", "native", "torch"] = "auto"
    context_length: int | None = Field(default=None, gt=0)
    block_length: int | None = Field(default=None, gt=0, le=1024)
    mask_token_id: int | None = Field(default=None, ge=0)
    rope_scaling: RopeScaling | None = None

    page_size: int = Field(default=16, gt=0, le=1024)
    max_total_tokens: int | None = Field(default=None, gt=0)
    mem_fraction: float = Field(default=0.5, gt=0.0, le=0.95)
    max_running_requests: int = Field(default=32, gt=0, le=4096)
    max_queued_requests: int = Field(default=1024, gt=0)
    chunked_prefill_size: int = Field(default=2048, gt=0)
    disable_radix_cache: bool = False
    disable_fused_commit: bool = False
    deterministic: bool = False
    schedule_policy: Literal["fcfs", "lpm", "priority"] = "fcfs"
    radix_eviction_policy: Literal["lru", "lfu"] = "lru"

    sparse_method: str = "dense"
    sparse_methods: tuple[str, ...] | None = Field(default=None, min_length=1)
    token_budget: int | None = Field(default=None, gt=0)
    active_tokens: int | None = Field(default=None, ge=0)
    active_ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    active_tau: float | None = Field(default=None, gt=0.0, le=1.0)
    sparse_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    algorithm: str = "low_confidence_dynamic"
    threshold: float = Field(default=0.9, ge=0.0, le=1.0)
    denoising_steps: int | None = Field(default=None, gt=0)
    random_seed: int = Field(default=0, ge=0, lt=2**63)
    show_progress: bool = True

    @classmethod
    def parse(cls, **values: Any) -> EngineConfig:
        """Validate keyword values. Raises ConfigError naming the option."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"]) or "configuration"
            raise ConfigError(f"{name}: found {first.get('input')!r}: {first['msg']}") from None

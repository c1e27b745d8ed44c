"""The engine's configuration: one frozen pydantic model. `auto` values are settled once, in `Engine`, and logged."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from losa_runtime.core.errors import ConfigError
from losa_runtime.core.options import option

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8", "fp8"]


class RopeScaling(BaseModel):
    """RoPE scaling beyond the trained length: linear interpolation, or YaRN (arXiv 2309.00071).

    kind is also understood under the names that it has in Hugging Face's configurations, rope_type and type.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["linear", "yarn"]
    factor: float = Field(gt=1.0)
    original_max_position_embeddings: int | None = Field(default=None, gt=0)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    attention_factor: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _names_of_kind(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "kind" in data:
            return data
        return {"kind" if name in ("rope_type", "type") else name: value for name, value in data.items()}


MODEL = "model"
MEMORY = "memory and batching"
SPARSE = "sparse attention (defaults; a request may choose otherwise in custom_params)"
DECODING = "decoding (defaults; a request may choose otherwise in custom_params)"


class EngineConfig(BaseModel):
    """Everything that is fixed for the life of an engine. A new field is a new option of every command that starts one.

    dtype and kv_cache_dtype: auto = float32 on a CPU, the checkpoint's else. attention_backend: auto = on a CPU native,
    where its kernels are built and it has AVX2, on a GPU triton; else torch. max_total_tokens: None = from free memory
    times mem_fraction_static.
    sparse_method … denoising_steps: defaults of `DiffusionParams`, see there. token_budget: None = 1024, or the context
    if that is shorter. sparse_min_context: 0 = always the method; otherwise "dense" must be among the sparse_methods.
    sparse_methods: only the page summaries and the state of these take memory. sparse_options: of
    `sparse_method`; they are not for requests that choose another method.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = option(..., MODEL, "checkpoint folder or hub id", names=("model_path",), metavar="PATH")
    tokenizer: str | None = option(
        None, MODEL, "its folder or hub id (default: the model's)", names=("tokenizer_path",), metavar="PATH"
    )
    dtype: DType = option("auto", MODEL, "of weights and activations")
    quantization: Quantization | None = option(
        None, MODEL, "keep the weights of the linear layers, lm_head aside, in 8 bits (needs torchao; default: none)"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", MODEL, "where the model runs")
    attention_backend: Literal["auto", "native", "triton", "flashinfer", "torch"] = option(
        "auto", MODEL, "how attention is computed"
    )
    context_length: int | None = option(
        None, MODEL, "longest prompt plus output in tokens (default: the model's)", gt=0
    )
    block_length: int | None = option(None, MODEL, "override the checkpoint's diffusion block length", gt=0, le=1024)
    block_grid: Literal["start", "prompt-end"] = option(
        "start",
        MODEL,
        "where blocks are counted from: position 0, or (A2D) such that one begins behind the prompt; then no prefixes "
        "are shared",
    )
    mask_token_id: int | None = option(None, MODEL, "override the checkpoint's mask token", ge=0)
    rope_scaling: RopeScaling | None = option(
        None, MODEL, 'override the checkpoint\'s, e.g. \'{"kind": "yarn", "factor": 4.0}\''
    )
    deterministic: bool = option(False, MODEL, "bitwise equal results whatever else runs; slower")
    random_seed: int = option(0, MODEL, "for requests that bring no seed of their own", ge=0, lt=2**63)

    kv_cache_dtype: DType = option("auto", MEMORY, "of the cached keys and values")
    mem_fraction_static: float = option(0.5, MEMORY, "share of free memory for the page pool", gt=0.0, le=0.95)
    max_total_tokens: int | None = option(None, MEMORY, "size of the page pool, instead of a share of memory", gt=0)
    page_size: int = option(16, MEMORY, "tokens per page", gt=0, le=1024)
    max_running_requests: int = option(32, MEMORY, "requests in one batch", gt=0, le=4096)
    max_queued_requests: int = option(1024, MEMORY, "requests that may wait; more get 503", gt=0)
    chunked_prefill_size: int = option(2048, MEMORY, "prompt tokens per round, over all requests", gt=0)
    schedule_policy: Literal["fcfs", "lpm", "priority"] = option(
        "fcfs", MEMORY, "who is admitted first: first come, longest cached prefix, or highest priority"
    )
    radix_eviction_policy: Literal["lru", "lfu"] = option(
        "lru", MEMORY, "which unlocked prefix goes first: least recently or least frequently used"
    )
    disable_radix_cache: bool = option(False, MEMORY, "share no prefixes between requests")
    disable_fused_commit: bool = option(
        False, MEMORY, "store a finished block in a forward of its own, not with the next block's first step"
    )

    overlap_schedule: Literal["auto", "on", "off"] = option(
        "auto", MEMORY, "make texts and messages of a round while the next forward runs (auto: on a GPU)"
    )

    disable_cuda_graph: bool = option(False, MEMORY, "record no denoising steps as CUDA graphs")
    cuda_graph_max_bs: int | None = option(
        None, MEMORY, "requests of the largest recorded step (default: max_running_requests)", gt=0, le=4096
    )

    sparse_method: str = option("dense", SPARSE, "what is read, e.g. dense, quest, losa", metavar="NAME")
    sparse_methods: tuple[str, ...] | None = option(
        None,
        SPARSE,
        "what requests may choose, by commas; pages keep only what these need (default: all)",
        min_length=1,
    )
    token_budget: int | None = option(None, SPARSE, "prefix tokens that each query may select (default: 1024)", gt=0)
    active_tokens: int | None = option(None, SPARSE, "LoSA: rows recomputed per step, by count", ge=0)
    active_ratio: float | None = option(None, SPARSE, "LoSA: the same as a share of the block", ge=0.0, le=1.0)
    active_tau: float | None = option(None, SPARSE, "LoSA: the same as a share of the total change", gt=0.0, le=1.0)
    sparse_options: dict[str, bool | int | float | str] = option(
        {}, SPARSE, "further options of the method, e.g. '{\"dense_layers\": 2}'"
    )

    sparse_min_context: int | Literal["auto"] = option(
        0,
        SPARSE,
        "prefix tokens from which the method is used; blocks behind shorter ones attend densely (auto: from where it "
        "is no slower here, measured at start)",
        metavar="N|auto",
    )

    algorithm: str = option(
        "low_confidence_dynamic", DECODING, "decoding algorithm", names=("algorithm", "dllm_algorithm"), metavar="NAME"
    )
    threshold: float = option(0.9, DECODING, "confidence above which the dynamic algorithm accepts", ge=0.0, le=1.0)
    entropy_bound: float = option(
        0.1, DECODING, "nats that tokens accepted together by entropy_bounded may have in sum", ge=0.0, le=1e6
    )
    edit_threshold: float = option(
        0.9, DECODING, "confidence above which joint_threshold replaces a token", ge=0.0, le=1.0
    )
    post_edit_steps: int = option(
        16, DECODING, "most steps of joint_threshold that begin without a mask", ge=0, le=1024
    )
    neighbour_penalty: float = option(
        0.0, DECODING, "joint_threshold: taken off the logit of the token on the left", ge=0.0, le=1e4
    )
    denoising_steps: int | None = option(None, DECODING, "planned steps per block (default: the block length)", gt=0)
    sub_block_length: int | None = option(
        None, DECODING, "fill a block in parts of so many positions, from left to right (default: all at once)", gt=0
    )

    debug_poison_pages: bool = option(
        False, MEMORY, "fill free pages with NaN, so that whoever reads one by mistake gets an error; slow"
    )
    show_progress: bool = True

    @field_validator("sparse_min_context", mode="before")
    @classmethod
    def _tokens_or_auto(cls, value: object) -> object:
        if value == "auto":
            return value
        tokens = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 10 else value
        if type(tokens) is not int or not 0 <= tokens < 10**9:
            raise ValueError("a number of tokens from 0, or auto")
        return tokens

    @classmethod
    def parse(cls, **values: Any) -> EngineConfig:
        """Validate keyword values. Raises ConfigError naming the option."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"]) or "configuration"
            raise ConfigError(f"{name}: found {first.get('input')!r}: {first['msg']}") from None

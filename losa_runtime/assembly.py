"""Builds an engine's parts from its configuration and settles every `auto`, with a log line for each choice.

Knows which class goes where, and nothing of requests or rounds.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import psutil
import torch

import losa_runtime
from losa_kernels.native.library import Kernels, NativeUnavailable, NativeUnfit
from losa_runtime.attention.backend import BackendConfig
from losa_runtime.attention.registry import make_backend, own_bytes
from losa_runtime.cache.kv_pool import KVPool, Summary
from losa_runtime.cache.prefix_cache import PrefixCache
from losa_runtime.core.architectures import SUPPORTED
from losa_runtime.core.batch import SparseParams
from losa_runtime.core.config import DType, EngineConfig
from losa_runtime.core.errors import ConfigError
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.decoding.registry import ALGORITHMS, settings_read
from losa_runtime.decoding.registry import resolve as resolve_decoding
from losa_runtime.layers.linear import ROW_TILE, use_row_tile
from losa_runtime.layers.mixture import use_kernels
from losa_runtime.layers.quantization import kept_bytes
from losa_runtime.least_prefix import LeastPrefix, settle_least_prefix
from losa_runtime.models.locate import locate_checkpoint
from losa_runtime.models.model import load_model
from losa_runtime.runner.cuda_recorder import CudaRecorder
from losa_runtime.runner.graphs import recording_bytes
from losa_runtime.runner.model_runner import ModelRunner
from losa_runtime.runner.unmask import Unmasker
from losa_runtime.sparse.memory import Geometry
from losa_runtime.sparse.method import make_methods, method_class, total_state_bytes
from losa_runtime.sparse.resolve import kept_summaries, offered_methods
from losa_runtime.sparse.resolve import resolve as resolve_sparse
from losa_runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# On a CPU the pool is zeroed and shares memory with everything else: auto stops at this many longest requests.
CPU_POOL_CONTEXTS = 8


class Parts(NamedTuple):
    """What an engine is made of.

    sparse: what a request without wishes gets. least_prefix: from which prefix on it gets it. context_length: prompt +
    output of one request, in whole blocks.
    overlap: whether a forward is in flight between two steps of the engine.
    sparse_state_bytes: what the methods keep for running requests.
    """

    config: EngineConfig
    model_config: ModelConfig
    tokenizer: Tokenizer
    cache: PrefixCache
    runner: ModelRunner
    geometry: Geometry
    sparse: SparseParams
    least_prefix: LeastPrefix
    context_length: int
    eos_token_ids: frozenset[int]
    overlap: bool
    folder: str
    tokenizer_folder: str
    sparse_state_bytes: int

    @property
    def fused_commit(self) -> bool:
        """Whether a finished block is stored in the forward that opens the next one: not if that needs its logits."""
        return not (self.config.disable_fused_commit or self.runner.model.shifted_logits)

    def info(self) -> dict[str, object]:
        """Facts about the engine, JSON-able."""
        pool, model, config = self.runner.backend.pool, self.model_config, self.config
        return {
            "model_path": self.folder,
            "tokenizer_path": self.tokenizer_folder,
            "architecture": model.architecture,
            "parameters": sum(p.numel() for p in self.runner.model.parameters()),
            "weight_bytes": kept_bytes(self.runner.model),
            "weight_bytes_unquantized": sum(p.numel() * p.dtype.itemsize for p in self.runner.model.parameters()),
            "quantization": config.quantization,
            "vocab_size": self.tokenizer.vocab_size,
            "block_length": model.block_length,
            "block_grid": config.block_grid,
            "mask_token_id": model.mask_token_id,
            "context_length": self.context_length,
            "device": str(pool.device),
            "dtype": str(next(self.runner.model.parameters()).dtype).removeprefix("torch."),
            "kv_cache_dtype": str(pool.dtype).removeprefix("torch."),
            "attention_backend": type(self.runner.backend).__name__,
            "attention_detail": self.runner.backend.detail,
            "threads": torch.get_num_threads(),
            "page_size": pool.page_size,
            "page_summaries": sorted(kind.value for kind in pool.summaries),
            "max_total_tokens": pool.num_pages * pool.page_size,
            "sparse_state_bytes": self.sparse_state_bytes,
            "kv_pool_bytes": pool.num_pages * _page_bytes(model, pool.page_size, pool.dtype, pool.summaries),
            "page_bytes": _page_bytes(model, pool.page_size, pool.dtype, frozenset()),
            "max_running_requests": config.max_running_requests,
            "max_queued_requests": config.max_queued_requests,
            "chunked_prefill_size": config.chunked_prefill_size,
            "radix_cache": self.cache.reuse,
            "radix_eviction_policy": config.radix_eviction_policy,
            "schedule_policy": config.schedule_policy,
            "deterministic": config.deterministic,
            "fused_commit": self.fused_commit,
            "shifted_logits": self.runner.model.shifted_logits,
            "overlap_schedule": self.overlap,
            "cuda_graph_max_bs": 0 if self.runner.graphs is None else self.runner.graphs.most,
            "debug_poison_pages": config.debug_poison_pages,
            "sparse_method": config.sparse_method,
            "sparse_methods": list(self.runner.methods),
            "token_budget": self.sparse.token_budget,
            "sparse_min_context": config.sparse_min_context,
            "sparse_from": self.least_prefix.table(config, self.geometry),
            "sparse_options": self.sparse.options.model_dump(),
            "algorithm": config.algorithm,
            "algorithms": list(ALGORITHMS),
            "algorithm_reads": settings_read(config.algorithm),
            "denoising_steps": config.denoising_steps or model.block_length,
            "sub_block_length": config.sub_block_length,
            "threshold": config.threshold,
            "entropy_bound": config.entropy_bound,
            "edit_threshold": config.edit_threshold,
            "post_edit_steps": config.post_edit_steps,
            "neighbour_penalty": config.neighbour_penalty,
            "version": losa_runtime.__version__,
            "torch_version": torch.__version__,
        }


def assemble(config: EngineConfig) -> Parts:
    """Load and connect everything. Raises ConfigError or CheckpointError before any large allocation, where it can."""
    _check_kernels()
    folder = locate_checkpoint(config.model, show_progress=config.show_progress)
    tokenizer_folder = folder
    if config.tokenizer is not None:
        tokenizer_folder = locate_checkpoint(config.tokenizer, weights=False, option="tokenizer")
    model_config = ModelConfig.from_folder(
        folder,
        block_length=config.block_length,
        mask_token_id=config.mask_token_id,
        rope_scaling=config.rope_scaling,
    )
    _check_grid(config, model_config)
    tokenizer = Tokenizer(tokenizer_folder, model_config.mask_token_id)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ConfigError(
            f"tokenizer: found {tokenizer.vocab_size} ids in {tokenizer_folder}, "
            f"allowed: at most the model's {model_config.vocab_size}"
        )
    device = _device(config)
    dtype = _dtype("dtype", config.dtype, torch.float32 if device.type == "cpu" else getattr(torch, model_config.dtype))
    kv_dtype = _dtype("kv_cache_dtype", config.kv_cache_dtype, dtype)
    context_length = _context_length(config, model_config)
    recorded = _recorded_requests(config, device)
    geometry = Geometry(
        num_layers=model_config.num_layers,
        num_heads=model_config.num_heads,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        block_length=model_config.block_length,
        page_size=config.page_size,
        max_slots=config.max_running_requests + (recorded > 0),  # one more for the padding of recorded steps
        context_length=context_length,
        device=device,
    )
    # Wrong defaults are found here and never meet a request.
    sparse = resolve_sparse(DiffusionParams(), config, geometry)
    resolve_decoding(DiffusionParams(), config, model_config.block_length)
    backend_config = BackendConfig(
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        num_heads=model_config.num_heads,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        page_size=config.page_size,
        block_length=model_config.block_length,
        same_bits=config.deterministic,
    )
    model = load_model(folder, model_config, dtype, device, config.show_progress, config.quantization)
    use_row_tile(model, ROW_TILE if config.deterministic else None)
    offered = offered_methods(config)
    state_bytes = total_state_bytes(geometry, dtype.itemsize, offered)
    reserved = state_bytes + own_bytes(config.attention_backend, backend_config)
    if recorded:
        reserved += recording_bytes(model_config, -(-context_length // config.page_size), recorded, dtype.itemsize)
    num_pages = _num_pages(config, model_config, kv_dtype, device, context_length, reserved)
    pool = KVPool(
        num_layers=model_config.num_layers,
        num_pages=num_pages,
        num_kv_heads=model_config.num_kv_heads,
        page_size=config.page_size,
        head_dim=model_config.head_dim,
        dtype=kv_dtype,
        device=device,
        summaries=kept_summaries(config),
    )
    _log_summaries(pool, offered)
    backend = make_backend(config.attention_backend, backend_config, pool)
    use_kernels(model, backend.kernels)
    unmasker = Unmasker(model, model_config.mask_token_id, tokenizer.vocab_size, model_config.block_length)
    runner = ModelRunner(model, backend, make_methods(geometry, offered), unmasker, device)
    if recorded:
        _record_steps(config, runner, recorded, device)
    least_prefix = settle_least_prefix(config, geometry, runner)
    if config.debug_poison_pages:
        pool.poison(np.arange(num_pages, dtype=np.int64))
    eos = model_config.eos_token_ids or (() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
    return Parts(
        config=config,
        model_config=model_config,
        tokenizer=tokenizer,
        cache=PrefixCache(
            num_pages,
            config.page_size,
            model_config.block_length,
            reuse=not config.disable_radix_cache and config.block_grid == "start",
            by_frequency=config.radix_eviction_policy == "lfu",
            on_free=pool.poison if config.debug_poison_pages else None,
        ),
        runner=runner,
        geometry=geometry,
        sparse=sparse,
        least_prefix=least_prefix,
        context_length=context_length,
        eos_token_ids=frozenset(eos),
        overlap=_overlap(config, device),
        folder=str(folder.resolve()),
        tokenizer_folder=str(tokenizer_folder.resolve()),
        sparse_state_bytes=state_bytes,
    )


def _check_kernels() -> None:
    """Not only the native backend uses them: whatever is chosen, a library of other sources is not passed over."""
    try:
        Kernels()
    except NativeUnavailable:
        pass  # whoever would use them says what it does instead
    except NativeUnfit as unfit:
        raise ConfigError(f"CPU kernels: {unfit}") from None


def _check_grid(config: EngineConfig, model: ModelConfig) -> None:
    allowed = SUPPORTED[model.architecture].grids
    if config.block_grid not in allowed:
        why = f"models of {model.architecture} were made with blocks counted from position 0"
        raise ConfigError(f"block_grid: found {config.block_grid!r}, allowed: {', '.join(allowed)} ({why})")
    if config.block_grid != "start":
        logger.info("block_grid %s: blocks move with a prompt's length; no prefixes are shared", config.block_grid)


def _device(config: EngineConfig) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        logger.info("device auto: %s", name)
    elif name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: found 'cuda', but torch sees no GPU; allowed here: cpu")
    return torch.device(name)


def _overlap(config: EngineConfig, device: torch.device) -> bool:
    """On a CPU the forward takes the very cores that the host's work would run on beside it."""
    if config.overlap_schedule != "auto":
        return config.overlap_schedule == "on"
    logger.info("overlap_schedule auto: %s", "off" if device.type == "cpu" else "on")
    return device.type != "cpu"


def _recorded_requests(config: EngineConfig, device: torch.device) -> int:
    """Requests of the largest denoising step that may be recorded as a CUDA graph; 0 = none is."""
    asked = config.cuda_graph_max_bs
    if device.type == "cuda" and not config.disable_cuda_graph:
        return min(asked or config.max_running_requests, config.max_running_requests)
    if asked is not None:
        why = "beside disable_cuda_graph" if config.disable_cuda_graph else f"on {device.type}"
        raise ConfigError(f"cuda_graph_max_bs: found {asked}, allowed: absent {why}")
    return 0


def _record_steps(config: EngineConfig, runner: ModelRunner, most: int, device: torch.device) -> None:
    """Let the runner record later denoising steps, if its backend can be recorded, and say so."""
    if not runner.backend.recordable:
        why = f"attention_backend {type(runner.backend).__name__} asks the host in every layer"
        if config.cuda_graph_max_bs is not None:
            raise ConfigError(f"cuda_graph_max_bs: found {most}, allowed: absent, since {why}")
        logger.info("CUDA graphs: none, since %s", why)
        return
    runner.record_steps(CudaRecorder(device), config.max_running_requests, most)
    names = [name for name, method in runner.methods.items() if method.recordable(method.Options())]
    logger.info("CUDA graphs: later steps of %s, up to %d requests", ", ".join(names), most)


def _dtype(option: str, wanted: DType, default: torch.dtype) -> torch.dtype:
    if wanted == "auto":
        logger.info("%s auto: %s", option, default)
        return default
    chosen: torch.dtype = getattr(torch, wanted)
    return chosen


def _context_length(config: EngineConfig, model: ModelConfig) -> int:
    """Whole blocks, at most what the position encoding covers: also the rest of a last block that begins anywhere."""
    limit = model.max_context - model.max_context % model.block_length
    if config.block_grid != "start":
        limit -= model.block_length
    wanted = config.context_length
    if wanted is None:
        logger.info("context_length auto: %d", limit)
        return limit
    if wanted > limit:
        raise ConfigError(f"context_length: found {wanted}, allowed: at most {limit} (rope_scaling stretches it)")
    if wanted < model.block_length:
        raise ConfigError(f"context_length: found {wanted}, allowed: at least one block of {model.block_length}")
    return wanted - wanted % model.block_length


def _page_bytes(model: ModelConfig, page_size: int, dtype: torch.dtype, summaries: frozenset[Summary]) -> int:
    return KVPool.bytes_per_page(model.num_layers, model.num_kv_heads, page_size, model.head_dim, dtype, summaries)


def _log_summaries(pool: KVPool, offered: Collection[str]) -> None:
    """What the pages keep beside K/V, and which methods read keys for want of a summary."""
    logger.info("page summaries: %s", ", ".join(sorted(kind.value for kind in pool.summaries)) or "none")
    page = 2 * pool.page_size * pool.head_dim * pool.dtype.itemsize
    text = "page summaries: %r reads keys for want of %s (%.1f%% of the memory of K/V; sparse_methods keeps it by name)"
    for name in offered:
        for kind in sorted(method_class(name).helpful - pool.summaries, key=lambda kind: kind.value):
            logger.info(text, name, kind.value, 100 * kind.bytes(pool.head_dim, pool.dtype) / page)


def _num_pages(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    context_length: int,
    reserved: int,
) -> int:
    """Pages of the pool: as asked, else a share of the memory that is free now, less `reserved` bytes."""
    page_bytes = _page_bytes(model, config.page_size, dtype, kept_summaries(config))
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    free = max(0, free - reserved)
    least = -(-model.block_length // config.page_size) * 2
    if config.max_total_tokens is not None:
        pages = config.max_total_tokens // config.page_size
        if pages < least:
            allowed = f"at least {least * config.page_size}"
            raise ConfigError(f"max_total_tokens: found {config.max_total_tokens}, allowed: {allowed}")
        if pages * page_bytes > free:
            raise ConfigError(
                f"max_total_tokens: found {config.max_total_tokens} ({pages * page_bytes >> 20} MiB), "
                f"allowed: at most {free // page_bytes * config.page_size} with {free >> 20} MiB free"
            )
        return pages
    pages = int(free * config.mem_fraction_static) // page_bytes
    if device.type == "cpu":
        requests = min(CPU_POOL_CONTEXTS, config.max_running_requests)
        pages = min(pages, -(-requests * context_length // config.page_size))
    if pages < least:
        raise ConfigError(
            f"mem_fraction_static: found {config.mem_fraction_static}, "
            f"too little for a page pool ({free >> 20} MiB free)"
        )
    logger.info("max_total_tokens auto: %d (%d MiB)", pages * config.page_size, pages * page_bytes >> 20)
    return pages

"""The native backend where it differs from the others: what it refuses, what auto chooses, its bits, its dtypes."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Literal

import pytest
import torch

from losa_kernels.native import library
from losa_runtime.assembly import assemble
from losa_runtime.attention.backend import BackendConfig
from losa_runtime.attention.native_backend import NativeBackend
from losa_runtime.attention.questions import PrefixPlan, RowGroup
from losa_runtime.attention.registry import make_backend
from losa_runtime.attention.torch_backend import TorchBackend
from losa_runtime.cache.kv_pool import KVPool, Summary
from losa_runtime.core.batch import ForwardMode, Segment
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import ConfigError
from tests.kernels.native import require_native, under_another_name

CPU = torch.device("cpu")
CONFIG = BackendConfig(CPU, torch.float32, torch.bfloat16, 4, 2, 16, page_size=8, block_length=4)


def pool_of(dtype: torch.dtype = torch.bfloat16) -> KVPool:
    return KVPool(1, 12, 2, 8, 16, dtype, CPU, frozenset({Summary.KEY_BOUNDS}))


def test_what_it_cannot_serve_it_says() -> None:
    require_native()
    assert NativeBackend.supports(CONFIG) is None
    for config, reason in (
        (CONFIG._replace(device=torch.device("cuda")), "runs on the CPU"),
        (CONFIG._replace(kv_dtype=torch.float8_e4m3fn), "no kernels for torch.float8_e4m3fn"),
        (CONFIG._replace(head_dim=1024), "head dim 1024, at most 512"),
        (CONFIG._replace(page_size=6), "page size 6 and block length 4"),
        (CONFIG._replace(num_heads=3), "3 query heads cannot share 2"),
    ):
        assert reason in str(NativeBackend.supports(config))
        with pytest.raises(ConfigError, match=reason):
            make_backend("native", config, pool_of())


def test_auto_takes_it_and_names_the_instruction_set(caplog: pytest.LogCaptureFixture) -> None:
    level = require_native().level
    with caplog.at_level(logging.INFO):
        assert isinstance(make_backend("auto", CONFIG, pool_of()), NativeBackend)
    assert f"attention_backend auto: native ({level})" in caplog.text


def test_auto_goes_on_without_it_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOSA_KERNELS", str(tmp_path / "none.so"))
    with caplog.at_level(logging.INFO):
        assert isinstance(make_backend("auto", CONFIG, pool_of()), TorchBackend)
    assert "attention_backend auto: torch ('native' cannot serve this model: none.so was not built" in caplog.text
    with pytest.raises(ConfigError, match=r"'native' cannot serve this model: none\.so was not built: run `make"):
        make_backend("native", CONFIG, pool_of())


@pytest.mark.parametrize("backend", ["auto", "native", "torch"])
def test_a_library_of_other_sources_is_an_error_whatever_the_backend(
    backend: Literal["auto", "native", "torch"],
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Path,
) -> None:
    require_native()
    monkeypatch.setenv("LOSA_KERNELS", str(under_another_name()))
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    why = r"CPU kernels: .*\.so has interface \d+, needed: \d+; run `make kernels`"
    with pytest.raises(ConfigError, match=why):
        assemble(EngineConfig(model=str(tiny_checkpoint), attention_backend=backend))
    if backend != "torch":
        with pytest.raises(ConfigError, match=why):
            make_backend(backend, CONFIG, pool_of())


def test_a_level_that_the_cpu_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    monkeypatch.setenv("LOSA_SIMD", "mmx")
    with pytest.raises(ConfigError, match="CPU kernels: LOSA_SIMD: found 'mmx', this CPU offers: portable"):
        make_backend("auto", CONFIG, pool_of())


def test_a_cpu_without_avx2_is_left_to_torch_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    monkeypatch.setattr(library, "LEVELS", ("portable",))
    assert "no AVX2" in str(NativeBackend.supports(CONFIG))
    monkeypatch.setenv("LOSA_SIMD", "portable")
    assert NativeBackend.supports(CONFIG) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_and_pages_of_every_dtype(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Store, prefill, prefix and block against torch: the same rounded pages, so the same results to float32."""
    require_native()
    config = CONFIG._replace(dtype=dtype, kv_dtype=kv_dtype)
    pages, k, v = torch.randperm(12)[:4], torch.randn(28, 2, 16).to(dtype), torch.randn(28, 2, 16).to(dtype)
    at = torch.arange(28)
    q = torch.randn(28, 4, 16).to(dtype)
    results = []
    for name in ("native", "torch"):
        backend = make_backend(name, config, pool_of(kv_dtype))
        backend.store_kv(0, k, v, pages[at // 8] * 8 + at % 8)
        stores = RowGroup.of([Segment(ForwardMode.PREFILL, 0, 28, 0, pages)], 4, CPU)
        group = RowGroup.of([Segment(ForwardMode.DENOISE, 0, 4, 28, pages, slot=0)], 4, CPU)
        prefix = backend.prefix(0, q[:4], PrefixPlan(), group)
        merged = backend.block_merged(prefix, q[:4], k[:4], v[:4], group)
        results.append((backend.prefill(0, q, stores).to(dtype), *prefix, merged))
    torch.testing.assert_close(results[0], results[1], rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=2e-3)
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-5, atol=2e-6)


def test_page_tables_are_made_once_per_group_and_die_with_it() -> None:
    require_native()
    backend = NativeBackend(pool_of(), 4)
    group = RowGroup.of([Segment(ForwardMode.DENOISE, 0, 4, 0, torch.arange(1), slot=0)], 4, CPU)
    assert backend._tables(group) is backend._tables(group)
    del group
    gc.collect()
    assert len(backend._segments) == 0

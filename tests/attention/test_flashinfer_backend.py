"""The FlashInfer backend against the reference, with a stand-in for the package: what it reads, and what it leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from losa_runtime.attention.backend import BackendConfig
from losa_runtime.attention.flashinfer_backend import FlashInferBackend
from losa_runtime.attention.questions import KVIndices, PrefixPlan, RowGroup
from losa_runtime.attention.registry import make_backend, own_bytes
from losa_runtime.attention.torch_backend import TorchBackend
from losa_runtime.cache.kv_pool import KVPool, Summary
from losa_runtime.core.batch import ForwardMode, Segment
from losa_runtime.core.errors import ConfigError
from tests.attention import fake_flashinfer
from tests.attention.fake_flashinfer import FakeWrapper
from tests.kernels.interpreter import DEVICE

H, G, D, B, PAGE, PAGES = 4, 2, 64, 4, 8, 40
CONFIG = BackendConfig(DEVICE, torch.float16, torch.float16, H, G, D, PAGE, B)
WHOLE = PrefixPlan()


@pytest.fixture(autouse=True)
def _package(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flashinfer.install(monkeypatch)


@pytest.fixture
def pool() -> KVPool:
    pool = KVPool(1, PAGES, G, PAGE, D, torch.float16, DEVICE, frozenset({Summary.KEY_BOUNDS}))
    for each in (pool.k(0), pool.v(0), pool.summary(0, Summary.KEY_BOUNDS)):
        each.fill_(float("nan"))
    return pool


def group_of(pool: KVPool, *about: tuple[int, int], mode: ForwardMode = ForwardMode.DENOISE) -> RowGroup:
    """Segments behind prefixes of some length, with so many rows each; what they see in the pages is stored."""
    free, segments, row = torch.randperm(PAGES), [], 0
    for index, (length, rows) in enumerate(about):
        end = length + rows if mode.stores else length
        held, free = free[: -(-end // PAGE)].to(DEVICE), free[-(-end // PAGE) :]
        at = torch.arange(end, device=DEVICE)
        k, v = (torch.randn(end, G, D, device=DEVICE).half() for _ in range(2))
        TorchBackend(pool, H).store_kv(0, k, v, held[at // PAGE] * PAGE + at % PAGE)
        segments.append(Segment(mode, row, row + rows, length, held, slot=index))
        row += rows
    return RowGroup.of(segments, B, DEVICE)


def queries(group: RowGroup) -> Tensor:
    return torch.randn(sum(group.counts), H, D, device=DEVICE).half()


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize(
    "about",
    [
        [(0, 4), (20, 4), (64, 4)],  # finished blocks
        [(0, 24)],
        [(16, 16), (12, 12)],  # chunks of prompts, one of which begins within a page
        [(12, 4), (20, 8), (0, 4), (16, 12)],  # both
    ],
)
def test_stored_rows(pool: KVPool, about: list[tuple[int, int]]) -> None:
    group = group_of(pool, *about, mode=ForwardMode.PREFILL)
    backend, q = FlashInferBackend(pool, H), queries(group)
    backend.prepare(group)
    close(backend.prefill(0, q, group).float(), TorchBackend(pool, H).prefill(0, q, group).float())


def test_whole_prefixes_are_planned_once_for_all_layers(pool: KVPool) -> None:
    group = group_of(pool, (20, B), (0, B), (61, B))
    backend, q = FlashInferBackend(pool, H), queries(group)
    FakeWrapper.made = 0
    for _ in range(2):
        close(backend.settle(backend.prefix(0, q, WHOLE, group)), TorchBackend(pool, H).prefix(0, q, WHOLE, group))
    assert FakeWrapper.made == 1


@pytest.mark.parametrize("heads", [G, H])
@pytest.mark.parametrize("granule", [PAGE, 1])
def test_lists(pool: KVPool, heads: int, granule: int) -> None:
    """For some rows and for all; one segment reads everything if lists are of pages, one has lists that are empty."""
    group = group_of(pool, (20, B), (33, B), (8, B))
    backend, reference, q = FlashInferBackend(pool, H), TorchBackend(pool, H), queries(group)
    width = -(-33 // granule)
    chosen = torch.rand(3, heads, width, device=DEVICE) < 0.5
    chosen[0, :, -(-20 // granule) :] = chosen[2] = False
    chosen[0, :, -(-20 // granule) - 1] = True
    chosen[1] = False
    kv = KVIndices.from_mask(chosen, (False, granule == PAGE, False))
    FakeWrapper.made = 0
    for rows in (None, torch.tensor([0, 3, 5, 9], device=DEVICE)):
        plan = PrefixPlan(rows, kv, granule)
        close(backend.settle(backend.prefix(0, q, plan, group)), reference.prefix(0, q, plan, group))
    assert FakeWrapper.made == 1


def test_what_it_has_no_layout_for_is_left_to_triton(pool: KVPool) -> None:
    group = group_of(pool, (20, B), (33, B))
    backend, reference, q = FlashInferBackend(pool, H), TorchBackend(pool, H), queries(group)
    FakeWrapper.made = 0
    own = KVIndices.from_mask(torch.rand(2 * B, G, 3, device=DEVICE) < 0.5, (False, False), per_row=True)
    large = KVIndices.from_mask(torch.ones(2, G, 2, dtype=torch.bool, device=DEVICE), (False, False))
    spelled = torch.tensor([0, 1, 2, 2, 2], device=DEVICE), torch.tensor([3, 9], device=DEVICE)
    apart = KVIndices(*spelled, G, (False, True))
    for plan in (PrefixPlan(None, own, PAGE), PrefixPlan(None, large, 2 * PAGE), PrefixPlan(None, apart, 1)):
        close(backend.settle(backend.prefix(0, q, plan, group)), reference.prefix(0, q, plan, group))
    peaks = [torch.empty(2 * B, H, 5, device=DEVICE) for _ in range(2)]
    found = [x.prefix(0, q, PrefixPlan(peaks=mine), group) for x, mine in zip((backend, reference), peaks, strict=True)]
    close(backend.settle(found[0]), found[1])
    close(peaks[0], peaks[1])
    assert FakeWrapper.made == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32}, "queries of torch.float32 and pages of torch.float16, allowed: both bfloat16"),
        ({"kv_dtype": torch.bfloat16}, "pages of torch.bfloat16"),
        ({"head_dim": 80}, "head dim 80, allowed: 64, 128, 256"),
        ({"same_bits": True}, "deterministic results need another backend"),
    ],
)
def test_refusals(pool: KVPool, change: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=f"'flashinfer' cannot serve this model: .*{why}"):
        make_backend("flashinfer", CONFIG._replace(**change), pool)


def test_a_package_that_does_not_fit_is_refused(pool: KVPool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_backend("flashinfer", CONFIG, pool), FlashInferBackend)
    fake_flashinfer.install(monkeypatch, version="0.7.2.post1")
    with pytest.raises(ConfigError, match=r"flashinfer-python: found version 0.7.2.post1, needed: .*0.6.18.post1"):
        make_backend("flashinfer", CONFIG, pool)


def test_its_memory_is_kept_free() -> None:
    assert own_bytes("flashinfer", CONFIG) >= 128 << 20
    assert own_bytes("auto", CONFIG) == own_bytes("torch", CONFIG) == 0
    assert own_bytes("flashinfer", CONFIG._replace(same_bits=True)) == 0, "refused when it is made"

"""What is the Triton backend's own: parts along the keys, plans made on the device, refusals."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from losa_kernels.triton.layout import Planned
from losa_runtime.attention.backend import BackendConfig
from losa_runtime.attention.questions import (
    ActiveRules,
    AttnParts,
    AttnState,
    PerSegment,
    PrefixPlan,
    RenewedStates,
    RowGroup,
)
from losa_runtime.attention.registry import make_backend
from losa_runtime.attention.torch_backend import TorchBackend
from losa_runtime.attention.triton_backend import TritonBackend
from losa_runtime.cache.kv_pool import KVPool, Summary
from losa_runtime.core.batch import ForwardMode, Segment
from losa_runtime.core.errors import ConfigError
from tests.kernels.interpreter import DEVICE

H, G, D, B, PAGE = 2, 1, 16, 4, 16
LENGTHS = (260, 0, 52)
CPU = torch.device("cpu")
CONFIG = BackendConfig(CPU, torch.float32, torch.float32, H, G, D, PAGE, B)


@pytest.fixture
def pool() -> KVPool:
    return KVPool(1, 40, G, PAGE, D, torch.float32, DEVICE, frozenset({Summary.KEY_BOUNDS}))


def group_of(pool: KVPool, lengths: tuple[int, ...] = LENGTHS) -> RowGroup:
    """Block segments over prefixes of these lengths, filled at random."""
    free, segments, reference = torch.randperm(40, device=DEVICE), [], TorchBackend(pool, H)
    for index, length in enumerate(lengths):
        held, free = free[: -(-length // PAGE)], free[-(-length // PAGE) :]
        at = torch.arange(length, device=DEVICE)
        k, v = (torch.randn(length, G, D, device=DEVICE) for _ in range(2))
        reference.store_kv(0, k, v, held[at // PAGE] * PAGE + at % PAGE)
        segments.append(Segment(ForwardMode.DENOISE, index * B, (index + 1) * B, length, held, slot=index))
    return RowGroup.of(segments, B, DEVICE)


def rows_of(group: RowGroup) -> tuple[Tensor, Tensor, Tensor]:
    rows = len(group.segments) * B
    return tuple(torch.randn(rows, heads, D, device=DEVICE) for heads in (H, G, G))  # type: ignore[return-value]


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


def test_parts_are_merged_where_they_are_used(pool: KVPool) -> None:
    """Enough processors to cut the longest prefix in three."""
    backend, reference = TritonBackend(pool, H), TorchBackend(pool, H)
    backend._processors = 64
    group = group_of(pool)
    q, k, v = rows_of(group)
    parts = backend.prefix(0, q, PrefixPlan(), group)
    assert isinstance(parts, AttnParts) and parts.out_CnHD.shape[0] == 3
    want = reference.prefix(0, q, PrefixPlan(), group)
    close(backend.settle(parts), want)
    close(backend.block_merged(parts, q, k, v, group), reference.block_merged(want, q, k, v, group))


def test_stored_rows_are_merged_from_parts(pool: KVPool) -> None:
    backend, reference = TritonBackend(pool, H), TorchBackend(pool, H)
    backend._processors = 64
    [segment] = group_of(pool, (264,)).segments
    group = RowGroup.of([Segment(ForwardMode.COMMIT, 0, 2 * B, 256, segment.pages)], B, DEVICE)
    q = torch.randn(2 * B, H, D, device=DEVICE)
    close(backend.prefill(0, q, group), reference.prefill(0, q, group))


def test_the_same_bits_whatever_the_number_of_processors(pool: KVPool) -> None:
    group = group_of(pool)
    q = rows_of(group)[0]
    found = []
    for processors in (1, 64):
        backend = TritonBackend(pool, H, same_bits=True)
        backend._processors = processors
        found.append(backend.settle(backend.prefix(0, q, PrefixPlan(), group)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def rules(count: tuple[int, ...], tau: float = 0.0, fresh: tuple[bool, ...] = (False,) * 3) -> ActiveRules:
    most = tuple(B if tau or every else n for n, every in zip(count, fresh, strict=True))
    counts, taus = torch.tensor(count, device=DEVICE), torch.full((3,), tau, device=DEVICE)
    return ActiveRules(counts, taus, fresh, most)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(
    "asked", [rules((1, 0, 2)), rules((0, 0, 0), 0.5), rules((1, 1, 1), fresh=(True, False, False))]
)
def test_rows_chosen_on_the_device_go_through_a_layer(pool: KVPool, asked: ActiveRules, by_head: bool) -> None:
    """Change, pages, attention, memory and merging, against the reference that knows how many there are."""
    backend, reference, group = TritonBackend(pool, H), TorchBackend(pool, H), group_of(pool)
    q, k, v = rows_of(group)
    slots, before = torch.tensor([2, 0, 3], device=DEVICE), torch.randn(4, B, H, D, device=DEVICE)
    queries = q.view(3, B, H, D)
    rows = backend.changed_rows(queries, before.clone(), slots, asked, group)
    want_rows = reference.changed_rows(queries, before.clone(), slots, asked, group)
    assert isinstance(rows, Planned) and isinstance(want_rows, Tensor) and rows.room == sum(asked.most)
    assert torch.equal(rows.rows[: int(rows.indptr[-1])], want_rows)
    assert all(int(n) <= bound for bound, n in zip(asked.most, rows.indptr.diff(), strict=True))

    whole, best = (False, True, True), PerSegment(torch.tensor([3, 1, 1], device=DEVICE), (3, 1, 1))
    kv, want_kv = (x.select_pages(0, q, y, whole, best, group).kv for x, y in ((backend, rows), (reference, want_rows)))
    assert torch.equal(kv.indptr, want_kv.indptr) and torch.equal(kv.indices[: int(kv.indptr[-1])], want_kv.indices)
    got = backend.prefix(0, q, PrefixPlan(rows, kv, PAGE), group)
    want = reference.prefix(0, q, PrefixPlan(want_rows, want_kv, PAGE), group)
    count = len(want_rows)
    close(AttnState(*(x[:count] for x in backend.settle(got))), want)

    memory = AttnState(torch.randn(4 * B, H, D, device=DEVICE), torch.randn(4 * B, H, device=DEVICE))
    place_R = (slots[:, None] * B + torch.arange(B, device=DEVICE)).flatten()
    heads = torch.rand(rows.room, H, device=DEVICE) < 0.5 if by_head else None
    copies = [AttnState(*(x.clone() for x in memory)) for _ in range(3)]
    renewed = [RenewedStates(copy, place_R, rows, got, heads) for copy in copies[:2]]
    expected = RenewedStates(copies[2], place_R, want_rows, want, None if heads is None else heads[:count])
    close(backend.settle(renewed[0]), reference.settle(expected))
    merged = backend.block_merged(renewed[1], q, k, v, group)
    close(merged, reference.block_merged(AttnState(*(x[place_R] for x in copies[2])), q, k, v, group))
    for copy in copies[:2]:
        close(copy, copies[2])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_changes_and_bounds_that_are_no_numbers_stay_within_the_bounds(pool: KVPool) -> None:
    """A request whose queries are broken takes as many rows as any other, and broken pages are read."""
    backend, group = TritonBackend(pool, H), group_of(pool)
    q = rows_of(group)[0]
    q[1:3] = torch.nan
    before = torch.zeros(3, B, H, D, device=DEVICE)
    slots = torch.arange(3, device=DEVICE)
    rows = backend.changed_rows(q.view(3, B, H, D), before, slots, rules((1, 1, 1)), group)
    assert isinstance(rows, Planned)
    assert rows.indptr.tolist() == [0, 1, 2, 3] and rows.rows.tolist()[0] == 1
    pool.summary(0, Summary.KEY_BOUNDS)[group.segments[2].pages[2]] = torch.nan
    best = PerSegment(torch.tensor([1, 1, 1], device=DEVICE), (1, 1, 1))
    kv = backend.select_pages(0, rows_of(group)[0], None, (True, True, False), best, group).kv
    assert kv.indices[: int(kv.indptr[-1])].tolist() == [2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("meta")}, "it runs on GPUs, not on meta"),
        ({"dtype": torch.float64}, "no kernels for torch.float64"),
        ({"head_dim": 128}, "head dim 128, allowed: up to 64 in float32, else up to 256"),
        ({"head_dim": 320, "dtype": torch.float16, "kv_dtype": torch.float16}, "head dim 320, allowed: up to 64"),
        ({"page_size": 12}, "page size 12, allowed: divisors of 128"),
        ({"page_size": 256}, "page size 256, allowed: divisors of 128"),
        ({"block_length": 1024}, "block length 1024 is too large for head dim 16 in torch.float32"),
        ({"page_size": 8, "block_length": 12}, "must divide one another"),
    ],
)
def test_refusals_name_the_reason(change: dict[str, Any], reason: str) -> None:
    found = TritonBackend.supports(CONFIG._replace(**change))
    assert found is not None and reason in found


def test_what_is_served() -> None:
    assert TritonBackend.supports(CONFIG) is None
    sixteen = CONFIG._replace(dtype=torch.float16, kv_dtype=torch.float16)
    assert TritonBackend.supports(sixteen._replace(head_dim=256, block_length=32)) is None


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    found = TritonBackend.supports(CONFIG)
    assert found is not None and "it runs on GPUs, not on cpu" in found


def test_a_missing_package_is_a_reason(pool: KVPool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__
    for name in ("triton_backend", "device_backend"):
        monkeypatch.delitem(sys.modules, f"losa_runtime.attention.{name}")

    def missing(name: str, *rest: Any) -> Any:
        if name == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match="'triton' cannot serve this model: the package 'triton' is not installed"):
        make_backend("triton", CONFIG, pool)

"""The Triton kernels about rows against the reference: query change, active rows, their lists, their gathering."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losa_kernels.reference import attention as ref_attention
from losa_kernels.reference import selection as ref
from losa_kernels.triton.active import active_rows, plan_rows
from losa_kernels.triton.change import keep_changed, query_change
from losa_kernels.triton.fold import fold_queries
from tests.kernels.interpreter import DEVICE
from tests.kernels.triton_world import make_world, plan

SLOTS = 5


def flags(*values: bool) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def remembered(block: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of three segments, what is remembered of all slots, and the slots of the segments."""
    now = torch.randn(3 * block, heads, dim, device=DEVICE).to(dtype)
    before = torch.randn(SLOTS, block, heads, dim, device=DEVICE).to(dtype)
    return now, before, torch.tensor([3, 0, 4], device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("block", "heads", "dim"), [(4, 3, 32), (3, 20, 80)])
def test_change_of_every_row(block: int, heads: int, dim: int, per_head: bool, dtype: torch.dtype) -> None:
    """The first segment is fresh: what is remembered of it is not even read, but replaced like the others."""
    now, before, slots = remembered(block, heads, dim, dtype)
    before[slots[0]] = torch.nan
    old, others = before.clone(), [1, 2]
    found = query_change(now, before, slots, flags(True, False, False), per_head)
    later = now.view(3, block, heads, dim)[1:]
    want = ref.query_change(later, old[slots[1:]], per_head)
    want = want.transpose(1, 2) if per_head else want[:, None]
    torch.testing.assert_close(found[1:], want, rtol=1e-5, atol=1e-6)
    assert found.shape == (3, heads if per_head else 1, block) and not found[0].any()
    assert torch.equal(before[slots], now.view(3, block, heads, dim)) and torch.equal(before[others], old[others])


def test_change_may_leave_what_is_remembered() -> None:
    now, before, slots = remembered(4, 2, 32)
    old = before.clone()
    query_change(now, before, slots, flags(False, False, False), replace=False)
    assert torch.equal(before, old)


@pytest.mark.parametrize("parts", [1, 6])
def test_only_what_is_active_is_remembered(parts: int) -> None:
    now, before, slots = remembered(4, 6, 32)
    want = before.clone()
    active = torch.rand(12, parts, device=DEVICE) < 0.5
    keep_changed(now, before, slots, active)
    for row, part in active.nonzero().tolist():
        heads = slice(part * 6 // parts, (part + 1) * 6 // parts)
        want[slots[row // 4], row % 4, heads] = now[row, heads]
    assert torch.equal(before, want)


@pytest.mark.parametrize("block", [4, 16, 32, 5])
@pytest.mark.parametrize("quantum", [None, 0.25])
def test_active_rows_by_count_and_share(block: int, quantum: float | None) -> None:
    """Multiples of a power of two have exact sums and many ties, which go to the lowest row."""
    rules = [(3, 0.0), (0, 0.5), (2, 0.75), (0, 0.0), (99, 0.0), (0, 1.0), (1, 0.25)]
    change = torch.rand(7, block) if quantum is None else torch.randint(0, 4, (7, block)) * quantum
    counts, taus = (torch.tensor(column, device=DEVICE) for column in zip(*rules, strict=True))
    fresh = torch.zeros(7, dtype=torch.bool, device=DEVICE)
    fresh[3] = True
    found = active_rows(change[:, None].to(DEVICE), counts, taus.float(), fresh)
    want = ref.active_rows(change.to(DEVICE), counts, taus)
    want[3] = True
    assert torch.equal(found.view(7, block), want)


def test_each_head_is_judged_by_itself() -> None:
    change = torch.randint(0, 5, (2, 6, 4), device=DEVICE).float()
    counts, taus = torch.tensor([2, 0], device=DEVICE), torch.tensor([0.0, 0.5], device=DEVICE)
    found = active_rows(change, counts, taus, flags(False, False))
    for head in range(6):
        assert torch.equal(found[:, head].view(2, 4), ref.active_rows(change[:, head], counts, taus))


@pytest.mark.parametrize(("block", "parts"), [(4, 1), (5, 3), (32, 1), (4, 32)])
def test_lists_of_active_rows(block: int, parts: int) -> None:
    """Enough segments that the rows before one are counted in several steps; some have no active row, some only."""
    segments = 70 if parts == 32 else 12
    active = torch.rand(segments * block, parts, device=DEVICE) < 0.3 / parts
    active[:block], active[block : 2 * block], active[-block:] = False, True, False
    planned = plan_rows(active, block)
    rows = active.any(1).nonzero().flatten()
    assert torch.equal(planned.rows[: len(rows)], rows)
    counts = active.any(1).view(segments, block).sum(1)
    assert planned.indptr.tolist() == [0, *counts.cumsum(0).tolist()]
    order = torch.full_like(planned.order, -1)
    order[rows] = torch.arange(len(rows), device=DEVICE)
    assert torch.equal(planned.order, order)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (6, 1, 80), (3, 3, 64)])
def test_planned_queries_are_folded(heads: int, kv_heads: int, dim: int) -> None:
    world = make_world([20, 5, 9], heads, kv_heads, dim, dtype=torch.float16)
    rows = [1, 7, 16, 17, 23]
    folded = fold_queries(world.q, plan(world, rows), kv_heads, 4, splits=2, room=4)
    assert folded.shape == (4, kv_heads, 2, 4, heads // kv_heads, dim)
    assert torch.equal(folded[:3, :, 0], folded[:3, :, 1])
    folded = folded[:, :, 0]
    for segment, mine in ((0, [1, 7]), (1, []), (2, [16, 17, 23])):
        count = len(mine)
        assert not folded[segment, :, count:].any()
        if mine:
            want = ref_attention.fold_heads(world.q[mine], kv_heads).view(kv_heads, count, -1, dim)
            assert torch.equal(folded[segment, :, :count], want)


def test_what_does_not_fit_is_refused() -> None:
    now, before, slots = remembered(4, 6, 32)
    with pytest.raises(ValueError, match="fresh: found shape"):
        query_change(now, before, slots, flags(True))
    with pytest.raises(ValueError, match=r"now: found torch.float16, allowed: torch.float32"):
        query_change(now.half(), before, slots, flags(True, True, True))
    with pytest.raises(ValueError, match="active: found 4 parts, allowed: divisors of 6"):
        keep_changed(now, before, slots, torch.ones(12, 4, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match="room: found 2, allowed: at least the 3 segments"):
        fold_queries(now, plan(make_world([20, 5, 9], 6), []), 6, 4, room=2)
    with pytest.raises(ValueError, match="active: found 10 rows, allowed: multiples of the block length 4"):
        plan_rows(torch.ones(10, 1, dtype=torch.bool, device=DEVICE), 4)

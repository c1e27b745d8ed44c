"""What a forward is said to have read, against counting with sets: plans of every kind, layer after layer."""

from __future__ import annotations

import pytest
import torch

from losa_kernels.triton.layout import Planned
from losa_runtime.attention.questions import KVIndices, PrefixPlan, RowGroup
from losa_runtime.cache.kv_pool import SUMMARY_VECTORS, KVPool
from losa_runtime.core.batch import ForwardMode, Segment
from losa_runtime.sparse.density import PrefixMeter

CPU = torch.device("cpu")
B, G, H, PAGE = 4, 2, 4, 8
POOL = KVPool(1, 4, G, PAGE, 8, torch.float32)
PREFIXES = (40, 0, 21, 64)
WITH_ROWS = (40, 0, 21, 0)  # prefixes of the segments of which random_plan plans some rows, not all


def make_group() -> RowGroup:
    pages = torch.arange(8)
    segments = [
        Segment(ForwardMode.DENOISE, i * B, (i + 1) * B, length, pages, slot=i) for i, length in enumerate(PREFIXES)
    ]
    return RowGroup.of(segments, B, CPU)


def random_plan(whole: tuple[bool, ...], heads: int, granule: int, per_row: bool, every_row: bool) -> PrefixPlan:
    """Segment 3 has no row unless all have; lists of some owners are empty."""
    rows = None if every_row else torch.tensor([0, 2, 3, 5, 9])
    owners = [row // B for row in (range(4 * B) if rows is None else rows.tolist())] if per_row else list(range(4))
    chosen = torch.rand(len(owners), heads, -(-max(PREFIXES) // granule)) < 0.4
    for place, owner in enumerate(owners):
        chosen[place, :, 0 if whole[owner] else -(-PREFIXES[owner] // granule) :] = False
    return PrefixPlan(rows, KVIndices.from_mask(chosen, whole)._replace(per_row=per_row), granule)


def positions(plan: PrefixPlan, segment: int, rows: list[int], head: int, heads: int) -> set[int]:
    """Prefix positions that some row of a segment reads with the lists that serve `head` of `heads`."""
    length, kv = PREFIXES[segment], plan.kv
    if not rows:
        return set()
    if kv is None or kv.whole[segment]:
        return set(range(length))
    every = list(range(4 * B)) if plan.rows is None else plan.rows.tolist()
    owners = [every.index(row) for row in rows] if kv.per_row else [segment]
    found: set[int] = set()
    for owner in owners:
        for mine in range(kv.heads):
            if mine == head * kv.heads // heads or mine * heads // kv.heads == head:
                entry = owner * kv.heads + mine
                for granule in kv.indices[int(kv.indptr[entry]) : int(kv.indptr[entry + 1])].tolist():
                    found |= set(range(granule * plan.granule, min(length, (granule + 1) * plan.granule)))
    return found


def check(plans: list[PrefixPlan]) -> None:
    meter = PrefixMeter(make_group(), CPU)
    for plan in plans:
        meter.add(plan, POOL)
    for segment, report in enumerate(meter.report(POOL)):
        length, density, by_query_head, shares, dense = PREFIXES[segment], 0.0, 0.0, [0.0] * B, True
        for plan in plans:
            every = range(4 * B) if plan.rows is None else plan.rows.tolist()
            rows = [row for row in every if row // B == segment]
            whole = plan.kv is None or plan.kv.whole[segment]
            read = sum(len(positions(plan, segment, rows, head, G)) for head in range(G))
            alone = sum(len(positions(plan, segment, rows, head, H)) for head in range(H))
            density += (read / (G * length) if length else float(whole and bool(rows))) / len(plans)
            by_query_head += (alone / (H * length) if length else float(whole and bool(rows))) / len(plans)
            shares = [share + (segment * B + i in rows) / len(plans) for i, share in enumerate(shares)]
            dense &= whole and len(rows) == B
        assert report.kv_density == pytest.approx(density) and report.kv_density_q == pytest.approx(by_query_head)
        assert report.row_shares == pytest.approx(tuple(shares)) and report.dense == dense
        assert report.kv_bytes == round(density * length * len(plans) * G * 2 * 8 * 4)


@pytest.mark.parametrize("granule", [1, 5, PAGE])
@pytest.mark.parametrize("every_row", [True, False])
def test_layers_with_one_list_per_kv_head(granule: int, every_row: bool) -> None:
    wholes = [(False, False, False, False), (False, True, True, False), (True, True, True, True)]
    check([random_plan(whole, G, granule, False, every_row) for whole in wholes])


def test_layers_of_every_kind() -> None:
    """Kinds that are counted at once and kinds that are noted first, sizes of granules and rows mixed."""
    none, some = (False,) * 4, (True, False, False, True)
    plans = [
        PrefixPlan(),
        PrefixPlan(torch.tensor([1, 2, 12])),
        PrefixPlan(torch.empty(0, dtype=torch.int64)),
        random_plan(none, G, PAGE, False, False),
        random_plan(some, G, 1, False, True),
        random_plan(some, H, PAGE, False, False),
        random_plan(none, G, PAGE, True, False),
        random_plan(none, H, 5, True, True),
        random_plan(none, G, 5, False, True),
    ]
    check(plans)
    check(plans[::-1])


def in_room(plan: PrefixPlan) -> PrefixPlan:
    """The same plan as a device makes it: rows and lists in room for more, and nonsense behind them."""
    rows, kv = plan.known_rows, plan.kv
    assert rows is not None and kv is not None
    order = torch.full((4 * B,), -1)
    order[rows] = torch.arange(len(rows))
    indptr = torch.searchsorted(rows, torch.arange(5) * B)
    padded = torch.cat((rows, torch.full((4 * B - len(rows),), 1 << 40)))
    ends = kv.indptr
    if kv.per_row:
        ends = torch.cat((ends, ends[-1:].expand((4 * B - len(rows)) * kv.heads)))
    indices = torch.cat((kv.indices, torch.full((50,), 1 << 40)))
    return plan._replace(rows=Planned(padded, indptr, order), kv=kv._replace(indptr=ends, indices=indices, most=99))


@pytest.mark.parametrize("whole", [(False,) * 4, (True, False, False, True)])
@pytest.mark.parametrize("granule", [1, 5, PAGE])
def test_layers_planned_on_the_device_count_as_much(whole: tuple[bool, ...], granule: int) -> None:
    """Of every kind; page summaries count only where a row was planned."""
    kinds = [(heads, per_row) for heads in (G, H) for per_row in (False, True)]
    scored = tuple(not mine for mine in whole)
    plans = [random_plan(whole, heads, granule, per_row, False)._replace(scored=scored) for heads, per_row in kinds]
    meters = [PrefixMeter(make_group(), CPU, whole) for _ in range(2)]
    for plan in plans:
        for meter, same in zip(meters, (plan, in_room(plan)), strict=True):
            meter.add(same, POOL)
            meter.also(same, POOL)
    known, planned = (meter.report(POOL) for meter in meters)
    assert [report[1:] for report in known] == [report[1:] for report in planned]
    vectors = [report.metadata_bytes // (G * 8 * 4) for report in known]
    assert vectors == [
        0 if mine or not n else 4 * -(-n // PAGE) * SUMMARY_VECTORS for mine, n in zip(whole, WITH_ROWS, strict=True)
    ]


def test_whole_prefixes_in_every_layer_are_dense() -> None:
    whole = KVIndices(torch.zeros(4 * G + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64), G, (True,) * 4)
    check([PrefixPlan(), PrefixPlan(torch.arange(4 * B)), PrefixPlan(None, whole, PAGE)])
    check([PrefixPlan(torch.arange(4 * B), whole, PAGE), PrefixPlan(torch.arange(4 * B - 1), whole, PAGE)])

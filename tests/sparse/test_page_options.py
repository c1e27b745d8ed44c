"""How QUEST and LoSA share lists of pages by their options, and that both densities count what is in the lists."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from losa_runtime.attention.questions import AttnState, PrefixPlan, RowGroup
from tests.sparse.stage import Sizes, Stage, denoise_item, params, random_rows
from tests.sparse.test_losa_options import LISTS, PROMPT, distance, run, still


@pytest.mark.parametrize("share", ["max", "mean", "none"])
def test_own_pages_do_not_depend_on_the_other_rows(share: str) -> None:
    def moved(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = random_rows(s, name, block, 0, layer)
        q[5] *= -3.0
        return q, k, v

    sizes = Sizes(layers=1)
    for pages, alike in (("own", True), ("union", False)):
        sparse = params("quest", share=share, pages=pages)
        one, two = (run(sizes, sparse, 1, rows)[0] for rows in (still, moved))
        others = [row for row in range(sizes.block) if row != 5]
        assert torch.equal(one.layers[0][others], two.layers[0][others]) == alike
        assert not torch.equal(one.layers[0][5], two.layers[0][5])


def test_own_pages_load_what_the_union_loads(sizes: Sizes) -> None:
    for share in ("max", "mean", "none"):
        own, union = (run(sizes, params("quest", share=share, pages=pages), 2) for pages in ("own", "union"))
        assert distance(own[1], union[1]) > 0.0
        for mine, other in zip(own, union, strict=True):
            assert mine.report is not None and other.report is not None
            assert mine.report[1:3] == pytest.approx(other.report[1:3], rel=1e-12)
            assert mine.report[3:] == other.report[3:]


def apart(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of a block lie along one channel; the query heads of a group look for different channels."""
    k = torch.zeros(s.block, s.kv_heads, s.dim)
    k[..., block % 12] = 1.0
    q = torch.zeros(s.block, s.heads, s.dim)
    for head in range(s.heads):
        q[:, head, head % (s.heads // s.kv_heads)] = 8.0 - head
    q[0] += 0.01 * step
    return q, k, torch.ones_like(k)


def test_disjoint_lists_of_grouped_heads_read_more_per_kv_head() -> None:
    """Each of three heads finds its own page of 12; together they load three times as much as with one list."""
    sizes, one = Sizes(layers=1, block=8, page=8), 8 / PROMPT
    reports = {}
    for share in ("max", "mean", "none"):
        reports[share] = run(sizes, params("losa", 8, 1, share=share), 2, apart)[1].report
    for share in ("max", "mean"):
        assert reports[share].kv_density == reports[share].kv_density_q == pytest.approx(one)
    assert reports["none"].kv_density_q == pytest.approx(one)
    assert reports["none"].kv_density == pytest.approx(3 * one)
    assert reports["none"].kv_bytes == 3 * reports["max"].kv_bytes


@pytest.mark.parametrize("active", [1, 3, 8])
def test_density_of_each_way_of_sharing(sizes: Sizes, active: int) -> None:
    reports = {
        share: run(sizes, params("losa", 16, active, share=share), 2)[1].report for share in ("max", "mean", "none")
    }
    for share in ("max", "mean"):
        assert reports[share].kv_density == reports[share].kv_density_q <= active * 16 / PROMPT + 1e-9
    none = reports["none"]
    assert none.kv_density_q <= active * 16 / PROMPT + 1e-9 and none.kv_density > none.kv_density_q
    assert none.kv_density > max(reports["max"].kv_density, reports["mean"].kv_density)


@pytest.mark.parametrize("method", ["quest", "losa"])
@pytest.mark.parametrize("lists", LISTS)
def test_both_densities_by_counting_the_lists(sizes: Sizes, method: str, lists: dict[str, Any]) -> None:
    """A request whose prefix ends inside a page, beside one that is read whole and one in its first step."""
    by_head = {"granularity": "head"} if method == "losa" else {}
    start, sparse = PROMPT + sizes.block, params(method, **lists, **by_head)
    stage, plans = Stage(sizes), []
    ask = stage.backend.prefix

    def spy(layer: int, q_RHD: Tensor, plan: PrefixPlan, group: RowGroup) -> AttnState:
        plans.append(plan)
        return ask(layer, q_RHD, plan, group)

    for name, prompt in (("a", start), ("b", 16), ("c", 48)):
        stage.prefill(name, prompt)
    stage.forward(denoise_item("a", start, sparse, 0, 0, sizes), denoise_item("b", 16, sparse, 0, 1, sizes))
    stage.backend.prefix = spy  # type: ignore[method-assign]
    items = [denoise_item("b", 16, sparse, 1, 1, sizes), denoise_item("a", start, sparse, 1, 0, sizes)]
    report = stage.forward(*items, denoise_item("c", 48, sparse, 0, 2, sizes))[1].report
    assert report is not None and len(plans) == sizes.layers
    wanted = [_shares_of(plan, 1, start, sizes) for plan in plans]
    for found, counts in zip(report[1:3], zip(*wanted, strict=True), strict=True):
        assert found == pytest.approx(sum(counts) / len(counts), rel=1e-12) and 0.0 < found <= 1.0


def _shares_of(plan: PrefixPlan, segment: int, length: int, sizes: Sizes) -> tuple[float, float]:
    """Share of the prefix in a segment's lists: per KV head and per list head, each after a union over owners."""
    assert plan.kv is not None
    ends, heads, rows = plan.kv.indptr.tolist(), plan.kv.heads, range(3 * sizes.block)
    planned = rows if plan.rows is None else plan.rows.tolist()
    owners = [row // sizes.block for row in planned] if plan.kv.per_row else [0, 1, 2]
    shares = []
    for apart in (sizes.kv_heads, heads):
        read: list[set[int]] = [set() for _ in range(apart)]
        for entry, (first, last) in enumerate(pairwise(ends)):
            if owners[entry // heads] == segment:
                for page in plan.kv.indices[first:last].tolist():
                    read[entry % heads * apart // heads] |= set(range(page * sizes.page, (page + 1) * sizes.page))
        shares.append(sum(len(positions & set(range(length))) for positions in read) / apart / length)
    return shares[0], shares[1]

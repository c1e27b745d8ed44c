"""LoSA's own laws: what its parameters reduce it to, what it remembers, how its density grows."""

from __future__ import annotations

import math
import zlib
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from losa_runtime.core.batch import SparseParams
from losa_runtime.sparse.memory import BlockMemory, state_shape
from tests.sparse.stage import Result, Sizes, Stage, denoise_item, params, random_rows

PROMPT = 96


def run(sizes: Sizes, sparse: SparseParams, steps: int = 4) -> list[Result]:
    stage = Stage(sizes)
    stage.prefill("r", PROMPT)
    return stage.denoise("r", PROMPT, sparse, steps)


def distance(left: Result, right: Result) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left.layers, right.layers, strict=True))


def test_all_rows_active_is_quest_after_the_first_step(sizes: Sizes) -> None:
    losa, quest = (run(sizes, params(method, active=sizes.block)) for method in ("losa", "quest"))
    dense = run(sizes, params("dense"))
    assert distance(losa[0], dense[0]) == 0.0 < distance(losa[0], quest[0])
    for mine, other in zip(losa[1:], quest[1:], strict=True):
        assert distance(mine, other) == 0.0


def test_no_active_rows_freeze_the_prefix_part(sizes: Sizes) -> None:
    """With the same in-block K/V and queries in every step, nothing at all may change."""

    def still(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q, _, _ = random_rows(s, name, block, step, layer)
        first = random_rows(s, name, block, 0, layer)
        moved = q if block < PROMPT // s.block else first[0]
        return moved, first[1], first[2]

    stage = Stage(sizes, rows=still)
    stage.prefill("r", PROMPT)
    frozen = stage.denoise("r", PROMPT, params("losa", active=0))
    assert all(distance(result, frozen[0]) == 0.0 for result in frozen)
    assert all(r.report is not None and r.report.active_rows == r.report.kv_bytes == 0 for r in frozen[1:])
    moving = run(sizes, params("losa", active=0), 3)
    assert distance(moving[1], moving[0]) > 0.0  # the in-block part is never frozen


def test_budget_above_the_prefix_leaves_only_staleness(sizes: Sizes) -> None:
    """Active rows are exact; stable rows carry the exact result of an earlier step."""
    losa = run(sizes, params("losa", budget=PROMPT, active=2), 2)
    dense = run(sizes, params("dense"), 2)
    rows = (losa[1].layers[0] - dense[1].layers[0]).abs().amax((1, 2))
    assert int((rows < 2e-6).sum()) >= 2 and float(rows.max()) > 1e-4
    assert losa[1].report is not None and losa[1].report.kv_density == 1.0 and not losa[1].report.dense


def test_an_unchanged_query_is_not_stale(sizes: Sizes) -> None:
    def few_move(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = random_rows(s, name, block, step, layer)
        calm = random_rows(s, name, block, 0, layer)[0]
        calm[1::2] = q[1::2]  # odd rows change
        return calm, k, v

    results = []
    for sparse in (params("losa", budget=PROMPT, active=sizes.block // 2), params("dense")):
        stage = Stage(sizes, rows=few_move)
        stage.prefill("r", PROMPT)
        results.append(stage.denoise("r", PROMPT, sparse))
    assert all(distance(mine, exact) < 2e-6 for mine, exact in zip(*results, strict=True))


def test_change_is_measured_against_the_previous_step_per_layer() -> None:
    """Row 0 moves in step 1 and then stays; row 5 moves in step 2: only row 5 is active then."""
    sizes = Sizes(layers=1)

    def moves(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = random_rows(s, name, block, 0, layer)
        q[0] += 5.0 * (step >= 1)
        q[5] += 1.0 * (step >= 2)
        return q, k, v

    stage = Stage(sizes, rows=moves)
    stage.prefill("r", PROMPT)
    _, first, second = stage.denoise("r", PROMPT, params("losa", active=0.9, kind="tau"), 3)
    assert first.report is not None and second.report is not None
    assert first.report.active_rows == second.report.active_rows == 1
    changed = (second.layers[0] - first.layers[0]).abs().amax((1, 2)) > 0
    assert changed.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize(
    ("rule", "value", "rows"),
    [("count", 5, 5), ("ratio", 0.5, 4), ("ratio", 0.01, 1), ("ratio", 0.26, 3)],
)
def test_active_rules_and_their_rounding(rule: str, value: float, rows: int) -> None:
    stage = Stage()
    stage.prefill("r", PROMPT)
    report = stage.denoise("r", PROMPT, params("losa", active=value, kind=rule), 2)[1].report
    assert report is not None and report.active_rows == rows


def test_one_remembered_step_does_not_reach_another_slot() -> None:
    stage, sparse = Stage(), params("losa", active=0)
    for name in ("a", "b"):
        stage.prefill(name, PROMPT)
    alone = stage.denoise("a", PROMPT, sparse, 2, slot=1)
    stage.denoise("a", PROMPT, sparse, 1, slot=1)
    stage.denoise("b", PROMPT, sparse, 2, slot=2)
    again = stage.forward(denoise_item("a", PROMPT, sparse, 1, 1, stage.sizes))[0]
    assert distance(again, alone[1]) == 0.0


def test_memory_is_b_times_d_plus_one_per_head() -> None:
    stage = Stage()
    stage.prefill("r", 16)
    stage.denoise("r", 16, params("losa"), 1)
    memory, s = stage.methods["losa"].memory, stage.sizes
    out, lse = memory.prefix._tensors or ()
    query = memory._queries._query
    assert query is not None and query.shape == out.shape == state_shape(stage.geometry)
    assert out.nbytes + lse.nbytes + query.nbytes == BlockMemory.bytes(stage.geometry, query.itemsize)
    assert out.numel() + lse.numel() == s.layers * s.slots * s.heads * s.block * (s.dim + 1)
    assert out.dtype == lse.dtype == torch.float32
    paper = stage.geometry._replace(num_layers=36, num_heads=32, head_dim=128, block_length=16, max_slots=1)
    assert math.prod(state_shape(paper)) // 128 * 129 == 2_377_728


def clustered(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys near one of a few directions per block; each query leans to a direction of its own and a common one."""
    draw = torch.Generator().manual_seed(zlib.crc32(repr((name, block, layer)).encode()))
    centres = torch.randn(12, s.dim, generator=torch.Generator().manual_seed(1)) * 2
    k = centres[torch.randint(12, (1,), generator=draw)] + torch.randn(s.block, s.kv_heads, s.dim, generator=draw)
    own = centres[torch.arange(s.block) % 12][:, None]
    q = centres[0] + 0.7 * own + 0.5 * torch.randn(s.block, s.heads, s.dim, generator=draw)
    moved = torch.arange(1, s.block + 1).flip(0)[:, None, None] * 0.02 * step  # row 0 changes most, then row 1, …
    return q + moved, k, torch.randn(s.block, s.kv_heads, s.dim, generator=draw)


def densities(budget: int, prompt: int, counts: range) -> list[float]:
    sizes = Sizes(layers=2, heads=4, kv_heads=2, dim=16, block=16, page=8, pages=prompt // 8 + 4)
    found = []
    for count in counts:
        stage = Stage(sizes, rows=clustered)
        stage.prefill("r", prompt)
        report = stage.denoise("r", prompt, params("losa", budget, count), 2)[1].report
        assert report is not None
        found.append(report.kv_density)
    return found


def test_density_grows_with_active_rows_ever_more_slowly() -> None:
    budget, prompt = 64, 1024
    share = densities(budget, prompt, range(1, 17))
    assert share[0] == pytest.approx(budget / prompt)
    for count, density in enumerate(share, start=1):
        assert budget / prompt - 1e-9 <= density <= min(1.0, count * budget / prompt) + 1e-9
    assert all(a <= b for a, b in pairwise(share)) and share[-1] > 1.5 * share[0]
    assert share[-1] < 0.6 * 16 * share[0]  # rows agree on much
    assert share[7] - share[0] > share[15] - share[8]  # the early rows bring more


def test_the_saving_over_all_rows_shrinks_as_the_budget_grows() -> None:
    ratios = []
    for budget in (32, 128, 512):
        few, every = densities(budget, 1024, range(5, 17, 11))
        ratios.append(every / few)
    assert ratios == sorted(ratios, reverse=True) and ratios[0] > 1.2

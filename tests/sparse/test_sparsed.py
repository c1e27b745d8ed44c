"""SparseD's own ideas: a share of dense steps, then key blocks of each query head that never change."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from losa_runtime.attention.questions import AttnState, PrefixPlan, RowGroup
from losa_runtime.core.batch import SparseParams
from losa_runtime.sparse.sparsed import dense_steps
from tests.sparse.oracle import block_outputs
from tests.sparse.stage import Result, Sizes, Stage, denoise_item, params, random_rows

PROMPT = 96


def run(
    sizes: Sizes, sparse: SparseParams, steps: int = 4, prompt: int = PROMPT
) -> tuple[list[Result], list[PrefixPlan]]:
    """The results of a block, and the plans of layer 0."""
    stage, seen = Stage(sizes), []
    stage.prefill("r", prompt)
    ask = stage.backend.prefix

    def spy(layer: int, q: Tensor, plan: PrefixPlan, group: RowGroup) -> AttnState:
        if layer == 0:
            seen.append(plan)
        return ask(layer, q, plan, group)

    stage.backend.prefix = spy  # type: ignore[method-assign]
    return stage.denoise("r", prompt, sparse, steps), seen


def lists(plan: PrefixPlan) -> list[list[int]]:
    """Key blocks per query head."""
    assert plan.kv is not None
    return [plan.kv.indices[a:b].tolist() for a, b in pairwise(plan.kv.indptr.tolist())]


@pytest.mark.parametrize(
    ("share", "planned", "dense"),
    [
        (0.2, 1, 1),
        (0.2, 5, 1),
        (0.2, 6, 2),
        (0.2, 16, 4),
        (0.2, 128, 26),
        (0.0, 8, 1),
        (0.7, 10, 7),  # 0.7 * 10 is above 7 as a float
        (0.07, 100, 7),
        (1.0, 8, 8),
    ],
)
def test_dense_steps_are_a_share_of_the_planned_ones(share: float, planned: int, dense: int) -> None:
    assert dense_steps(share, planned) == dense


@pytest.mark.parametrize(("share", "planned", "dense"), [(0.2, 4, 1), (0.2, 8, 2), (0.5, 5, 3), (0.0, 8, 1)])
def test_so_many_steps_read_everything(share: float, planned: int, dense: int) -> None:
    results, _ = run(Sizes(), params("sparsed", planned_steps=planned, dense_share=share), 5)
    reports = [result.report for result in results if result.report is not None]
    assert [report.dense for report in reports] == [True] * dense + [False] * (5 - dense)
    assert [report.metadata_bytes > 0 for report in reports] == [step == dense - 1 for step in range(5)]


def test_a_block_that_ends_early_never_turns_sparse() -> None:
    results, _ = run(Sizes(), params("sparsed", planned_steps=16), 3)
    exact, _ = run(Sizes(), params("dense"), 3)
    for mine, dense in zip(results, exact, strict=True):
        assert mine.report is not None and mine.report.dense and mine.report.metadata_bytes == 0
        assert all(torch.equal(a, b) for a, b in zip(mine.layers, dense.layers, strict=True))


def test_every_query_head_has_key_blocks_of_its_own(sizes: Sizes) -> None:
    results, plans = run(sizes, params("sparsed", budget=16, block_size=8))
    chosen = lists(plans[-1])
    assert plans[-1].rows is None and plans[-1].granule == 8
    assert len(chosen) == sizes.heads and all(len(blocks) == 2 for blocks in chosen)
    assert len({tuple(blocks) for blocks in chosen[: sizes.heads // sizes.kv_heads]}) > 1
    report = results[-1].report
    assert report is not None and report.kv_density_q == pytest.approx(16 / PROMPT) and not report.dense
    assert report.kv_density_q < report.kv_density <= sizes.heads / sizes.kv_heads * report.kv_density_q


def test_the_choice_stays_while_queries_move(sizes: Sizes) -> None:
    results, plans = run(sizes, params("sparsed", block_size=4), 5)
    assert [plan.kv is None for plan in plans] == [True, True, False, False, False]
    assert lists(plans[2]) == lists(plans[3]) == lists(plans[4])
    _, other = run(sizes, params("sparsed", block_size=4, planned_steps=5), 3)  # chooses one step earlier
    assert lists(other[1]) == lists(other[2]) != lists(plans[2])
    assert not torch.equal(results[3].layers[0], results[2].layers[0])


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        (16, {"block_size": 4}),
        (16, {"block_size": 5}),  # the last key block is short, pages and key blocks do not match
        (24, {"block_size": 64}),
        (16, {"block_size": 8, "dense_share": 0.3}),
        (16, {"block_size": 16, "keep_ratio": 0.3}),
        (8, {"block_size": 7, "keep_ratio": 0.5}),
    ],
)
def test_results_with_other_options_are_those_of_the_paper(sizes: Sizes, budget: int, options: dict[str, Any]) -> None:
    stage, sparse = Stage(sizes), params("sparsed", budget, **options)
    stage.prefill("r", PROMPT)
    want = block_outputs(stage, "r", PROMPT, sparse, 4)
    for got, expected in zip(stage.denoise("r", PROMPT, sparse, 4), want, strict=True):
        for mine, oracle in zip(got.layers, expected, strict=True):
            torch.testing.assert_close(mine.double(), oracle, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("budget", "size", "count"), [(16, 32, 1), (32, 32, 1), (40, 32, 2), (16, 3, 6)])
def test_a_budget_is_rounded_up_to_whole_key_blocks(budget: int, size: int, count: int) -> None:
    _, plans = run(Sizes(), params("sparsed", budget, block_size=size))
    assert all(len(blocks) == count for blocks in lists(plans[-1]))


@pytest.mark.parametrize(("ratio", "count"), [(0.3, 4), (0.5, 7), (0.01, 1)])
def test_keep_ratio_takes_the_place_of_the_budget(ratio: float, count: int) -> None:
    for budget in (8, 4096):
        _, plans = run(Sizes(), params("sparsed", budget, block_size=8, keep_ratio=ratio))
        assert all(len(blocks) == count for blocks in lists(plans[-1]))


def test_keeping_all_is_dense_without_a_choice() -> None:
    results, _ = run(Sizes(), params("sparsed", 8, block_size=8, keep_ratio=1.0))
    assert all(r.report is not None and r.report.bypassed and r.report.dense for r in results)


def test_a_short_last_key_block_is_no_favourite_and_release_forgets() -> None:
    """One key with a little more than a full block's mean, but much less than its sum, stands last."""

    def last_is_good(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = random_rows(s, name, block, step, layer)
        k = torch.zeros_like(k)
        if block == 1:
            k[:] = 1.0
        if block == 3:
            k[-1] = 1.1
        return torch.ones_like(q), k, v

    stage, sparse = Stage(rows=last_is_good), params("sparsed", 8, block_size=31)  # key blocks: 0 to 30, and 31
    stage.prefill("r", 32)
    stage.denoise("r", 32, sparse, 2)
    method = stage.methods["sparsed"]
    held = method._lists  # type: ignore[attr-defined]
    assert held.lists(0, [0], (False,)).indices.tolist() == [0] * stage.sizes.heads
    method.release(0)
    with pytest.raises(AssertionError, match="without an opening step"):
        held.lists(0, [0], (False,))
    with pytest.raises(AssertionError, match="without an opening step"):  # also in a dense step
        stage.forward(denoise_item("r", 32, sparse, 1, 0, stage.sizes))


def test_neighbours_with_other_plans_and_phases_are_not_felt(sizes: Sizes) -> None:
    """In one forward: a dense step, one that chooses, and sparse ones of two budgets."""
    company = {
        "a": (PROMPT, params("sparsed", block_size=8, planned_steps=16), 0),
        "b": (64, params("sparsed", budget=32, block_size=8, planned_steps=10), 0),
        "c": (80, params("sparsed", block_size=8, planned_steps=5), 0),
        "d": (48, params("sparsed", block_size=8, planned_steps=8), 1),
    }
    stage = Stage(sizes)
    for name, (prompt, _, _) in company.items():
        stage.prefill(name, prompt)
    for name, (prompt, sparse, ahead) in company.items():
        stage.denoise(name, prompt, sparse, ahead, slot=ord(name) % 4)
    together = [
        stage.forward(
            *(
                denoise_item(name, prompt, sparse, step + ahead, ord(name) % 4, sizes)
                for name, (prompt, sparse, ahead) in company.items()
            )
        )
        for step in range(3)
    ]
    for index, (name, (prompt, sparse, ahead)) in enumerate(company.items()):
        alone = Stage(sizes, seed=3)
        alone.prefill(name, prompt)
        for mine, other in zip(together, alone.denoise(name, prompt, sparse, 3 + ahead)[ahead:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine[index].layers, other.layers, strict=True))
            assert mine[index].report[1:] == other.report[1:]  # type: ignore[index]

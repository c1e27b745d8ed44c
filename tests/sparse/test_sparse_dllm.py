"""Sparse-dLLM's own ideas: a delayed choice by the mean query, pooled over neighbours, one set for all heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import ConfigError, InvalidRequest
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.resolve import resolve
from losa_runtime.sparse.sparse_dllm import kept_tokens, pooled_scores
from tests.sparse.oracle import block_outputs
from tests.sparse.spy import lists, watch
from tests.sparse.stage import Result, Sizes, Stage, denoise_item, params, random_rows

PROMPT = 96


def run(sizes: Sizes, steps: int = 4, budget: int = 16, **options: Any) -> tuple[list[Result], list[list[list[int]]]]:
    """The results of a block, and the lists of layer 0 in the steps that had some."""
    stage = Stage(sizes)
    stage.prefill("r", PROMPT)
    plans = watch(stage)
    results = stage.denoise("r", PROMPT, params("sparse_dllm", budget, **options), steps)
    assert all(plan.rows is None and plan.granule == 1 for plan in plans)
    return results, [lists(plan) for plan in plans if plan.kv is not None]


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_the_last_dense_step_chooses_and_nobody_after_it(sizes: Sizes, delay: int) -> None:
    results, chosen = run(sizes, 5, delay=delay)
    reports = [result.report for result in results if result.report is not None]
    assert [report.dense for report in reports] == [step <= delay for step in range(5)]
    assert [report.metadata_bytes > 0 for report in reports] == [step == delay for step in range(5)]
    assert len(chosen) == 4 - delay and all(each == chosen[0] for each in chosen)


def test_the_choice_is_that_of_the_last_dense_step(sizes: Sizes) -> None:
    assert run(sizes, 6, delay=0)[1][0] != run(sizes, 6, delay=4)[1][0]


def test_all_heads_share_one_set(sizes: Sizes) -> None:
    results, chosen = run(sizes)
    assert len(chosen[0]) == sizes.kv_heads and all(each == chosen[0][0] for each in chosen[0])
    report = results[-1].report
    assert report is not None and report.kv_density == report.kv_density_q == pytest.approx(16 / PROMPT)


@pytest.mark.parametrize(("kernel", "kept"), [(1, {40}), (3, {39, 40, 41}), (5, {38, 39, 40, 41, 42})])
def test_neighbours_of_a_strong_key_are_kept(kernel: int, kept: set[int]) -> None:
    """One key stands out for one KV head. Pages hold 8 tokens: the neighbours at 38 and 39 are in another one."""

    def one_strong(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = random_rows(s, name, block, step, layer)
        k = 0.01 * k
        if block == 40 // s.block:
            k[40 % s.block, 1] = 5.0
        return q.abs(), k, v

    stage = Stage(rows=one_strong)
    stage.prefill("r", PROMPT)
    plans = watch(stage)
    stage.denoise("r", PROMPT, params("sparse_dllm", 8, kernel=kernel), 3)
    chosen = lists(plans[-1])
    assert all(kept <= set(each) for each in chosen) and len(chosen[0]) == 8
    if kernel > 1:
        stage.denoise("r", PROMPT, params("sparse_dllm", 8, kernel=1), 3)
        assert not any(kept <= set(each) for each in lists(plans[-1]))


def test_equal_scores_go_to_the_lowest_tokens() -> None:
    keys = torch.zeros(1, 9, 2)
    keys[0, [1, 7]] = 3.0
    assert pooled_scores(torch.ones(4, 2, 2), keys, 3).tolist() == [6, 6, 6, 0, 0, 0, 6, 6, 6]

    def two_strong(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = random_rows(s, name, block, step, layer)
        strong = (torch.arange(s.block) + block * s.block)[:, None, None] % 40 == 2  # 2, 42, 82
        return torch.ones_like(q), strong * torch.ones_like(k), v

    stage = Stage(rows=two_strong)
    stage.prefill("r", PROMPT)
    plans = watch(stage)
    stage.denoise("r", PROMPT, params("sparse_dllm", 8), 3)
    assert lists(plans[-1])[0] == [1, 2, 3, 41, 42, 43, 81, 82]


@pytest.mark.parametrize("signs", [(1, -1), (-1, 1)])
def test_the_mean_is_over_rows_and_all_heads(signs: tuple[int, int]) -> None:
    """What one head wants can be outweighed by what the others do not want: products are averaged with their sign."""
    q, keys = torch.ones(2, 4, 2), torch.zeros(2, 5, 2)
    q[0] = 3.0
    keys[0, 3], keys[1, 3] = 2.0 * signs[0], 1.0 * signs[1]
    expected = (2 * signs[0] + signs[1]) / 2 * 2 * 2  # mean over heads, mean query 2, two channels
    assert pooled_scores(q, keys, 1).tolist() == [0, 0, 0, expected, 0]


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        (8, {"kernel": 1}),
        (24, {"kernel": 7}),
        (16, {"delay": 0}),
        (16, {"delay": 2}),
        (96, {"keep_ratio": 0.3}),
        (8, {"keep_ratio": 0.5, "kernel": 5}),
    ],
)
def test_results_with_other_options_are_those_of_the_paper(sizes: Sizes, budget: int, options: dict[str, Any]) -> None:
    stage, sparse = Stage(sizes), params("sparse_dllm", budget, **options)
    stage.prefill("r", PROMPT)
    want = block_outputs(stage, "r", PROMPT, sparse, 4)
    for got, expected in zip(stage.denoise("r", PROMPT, sparse, 4), want, strict=True):
        for mine, oracle in zip(got.layers, expected, strict=True):
            torch.testing.assert_close(mine.double(), oracle, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("ratio", "length", "count"), [(0.5, 96, 48), (0.5, 97, 49), (0.07, 100, 7), (0.001, 16, 1)])
def test_keep_ratio_is_rounded_up_to_a_token(ratio: float, length: int, count: int) -> None:
    assert kept_tokens(ratio, length) == count


def test_keep_ratio_takes_the_place_of_the_budget() -> None:
    for budget in (8, 4096):
        results, chosen = run(Sizes(), 3, budget, keep_ratio=0.3)
        assert [len(each) for each in chosen[-1]] == [29, 29]  # 28.8, rounded up
        assert all(result.report is not None and not result.report.bypassed for result in results)
    results, _ = run(Sizes(), 3, 8, keep_ratio=1.0)
    assert all(r.report is not None and r.report.bypassed and not r.report.metadata_bytes for r in results)


def test_an_even_kernel_is_refused() -> None:
    geometry = Stage().geometry
    wanted = DiffusionParams(sparse_method="sparse_dllm", sparse_options={"kernel": 4})
    with pytest.raises(InvalidRequest, match=r"custom_params.sparse_options.kernel: found 4, allowed: an odd number"):
        resolve(wanted, EngineConfig.parse(model="m"), geometry)
    config = EngineConfig.parse(model="m", sparse_method="sparse_dllm", sparse_options={"kernel": 2})
    with pytest.raises(ConfigError, match=r"sparse_options.kernel: found 2, allowed: an odd number, e.g. 1 or 3"):
        resolve(DiffusionParams(), config, geometry)


def test_neighbours_in_other_phases_are_not_felt(sizes: Sizes) -> None:
    """In one forward: a first step, one that chooses, one that reads its choice, and a prefix that is read whole."""
    company = {"a": (PROMPT, 16, 0), "b": (64, 24, 1), "c": (80, 16, 2), "d": (16, 16, 2)}
    stage = Stage(sizes)
    for slot, (name, (prompt, budget, ahead)) in enumerate(company.items()):
        stage.prefill(name, prompt)
        stage.denoise(name, prompt, params("sparse_dllm", budget), ahead, slot)
    together = [
        stage.forward(
            *(
                denoise_item(name, prompt, params("sparse_dllm", budget), step + ahead, slot, sizes)
                for slot, (name, (prompt, budget, ahead)) in enumerate(company.items())
            )
        )
        for step in range(3)
    ]
    for place, (name, (prompt, budget, ahead)) in enumerate(company.items()):
        alone = Stage(sizes, seed=3)
        alone.prefill(name, prompt)
        results = alone.denoise(name, prompt, params("sparse_dllm", budget), 3 + ahead)[ahead:]
        for mine, other in zip([step[place] for step in together], results, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(mine.layers, other.layers, strict=True))
            assert mine.report is not None and other.report is not None and mine.report[1:] == other.report[1:]

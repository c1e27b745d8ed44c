"""The meeting: batches in which every phase and method comes together, and what must not be felt of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losa_runtime.core.batch import ForwardMode
from losa_runtime.sparse.method import METHODS
from tests.sparse.stage import Item, Result, Sizes, Stage, denoise_item, params, random_rows

LOSA, QUEST, DENSE = params("losa"), params("quest"), params("dense")

RESTING = ("losa_plus", "flashblock")  # read nothing in a later step if no row moved, or too few tokens are new


def equal(left: Result, right: Result) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.layers, right.layers, strict=True))


def prepared(sizes: Sizes, dtype: torch.dtype, seed: int) -> tuple[Stage, dict[str, list[Item]]]:
    """Requests in the middle of their lives, and what each does next."""
    stage, block = Stage(sizes, dtype, seed=seed), sizes.block
    prompts = {"prefill": 2 * block, "fused": 48, "losa": 80, "quest": 64, "score": 48, "dense": 32, "short": 0}
    for name, prompt in prompts.items():
        stage.prefill(name, prompt)
    stage.forward(denoise_item("losa", 80, LOSA, 0, 1, sizes), denoise_item("short", 0, LOSA, 0, 4, sizes))
    after = 48 + block
    return stage, {
        "prefill": [Item("prefill", ForwardMode.PREFILL, 2 * block, 3 * block)],
        "fused": [
            Item("fused", ForwardMode.COMMIT, 48, block),
            denoise_item("fused", after, LOSA, 0, 0, sizes),
        ],
        "losa": [denoise_item("losa", 80, LOSA, 1, 1, sizes)],
        "quest": [denoise_item("quest", 64, QUEST, 2, 2, sizes)],
        "score": [Item("score", ForwardMode.SCORE, 16, block), Item("score", ForwardMode.SCORE, 48, block)],
        "dense": [denoise_item("dense", 32, DENSE, 3, 3, sizes)],
        "short": [denoise_item("short", 0, LOSA, 1, 4, sizes)],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_request_of_a_mixed_batch_is_as_if_alone(sizes: Sizes, dtype: torch.dtype) -> None:
    stage, plans = prepared(sizes, dtype, seed=0)
    # Stores first; the rest interleaved so that no group lies in one piece.
    items = sorted((item for plan in plans.values() for item in plan), key=lambda item: not item.mode.stores)
    items[2:] = items[2::2] + items[3::2]
    assert [item.mode.stores for item in items].count(True) == 2
    together = dict(zip(items, stage.forward(*items), strict=True))
    for name, plan in plans.items():
        alone, _ = prepared(sizes, dtype, seed=11)
        for item, result in zip(plan, alone.forward(*plan), strict=True):
            assert equal(together[item], result), (name, item.mode)
            mine = together[item].report
            assert (mine is None) == (result.report is None) == item.mode.stores
            assert mine is None or result.report is None or mine[1:] == result.report[1:]
            assert all(bool(out.isfinite().all()) for out in result.layers)
    for layer in range(sizes.layers):  # and the pages hold the same
        for name in ("prefill", "fused"):
            alone, plans = prepared(sizes, dtype, seed=11)
            alone.forward(*plans[name])
            mine, other = (s.pool.k(layer)[s.table(name, 0)] for s in (stage, alone))
            assert torch.equal(mine.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("method", METHODS)
def test_commit_and_open_in_one_forward_or_in_two(sizes: Sizes, method: str) -> None:
    start, sparse = 48, params(method)
    commit = Item("r", ForwardMode.COMMIT, start, sizes.block)
    opening, later = (denoise_item("r", start + sizes.block, sparse, step, 0, sizes) for step in (0, 1))
    results = []
    for fused in (True, False):
        stage = Stage(sizes)
        stage.prefill("r", start)
        outs = stage.forward(commit, opening) if fused else [*stage.forward(commit), *stage.forward(opening)]
        results.append([*outs, *stage.forward(later)])
    assert all(equal(a, b) for a, b in zip(*results, strict=True))


def test_scored_blocks_read_densely_and_leave_no_state(sizes: Sizes) -> None:
    stage = Stage(sizes)
    stage.prefill("r", 64)
    score = Item("r", ForwardMode.SCORE, 64, sizes.block)
    result = stage.forward(score)[0]
    dense = stage.denoise("r", 64, DENSE, 1)[0]
    assert equal(result, dense)
    assert result.report is not None and result.report.dense and not result.report.bypassed
    assert stage.methods["losa"].memory._queries._query is None


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_shorter_than_a_block(sizes: Sizes, method: str) -> None:
    stage = Stage(sizes)
    results = stage.denoise("r", 0, params(method), 3)
    for result in results:
        assert all(bool(out.isfinite().all()) for out in result.layers)
        assert result.report is not None and result.report.kv_bytes == 0
        assert result.report.kv_density == 1.0 or method in RESTING
    q, k, v = stage.rows(sizes, "r", 0, 1, 0)
    scores = (k[:, 0] @ q[2, 0]) / sizes.dim**0.5
    torch.testing.assert_close(results[1].layers[0][2, 0], scores.softmax(0) @ v[:, 0], rtol=1e-4, atol=1e-5)


def test_a_prompt_cut_into_chunks_fills_the_same_pages(sizes: Sizes) -> None:
    whole, cut = Stage(sizes), Stage(sizes, seed=5)
    whole.prefill("r", 96)
    for start, stop in ((0, 16), (16, 80), (80, 96)):
        cut.prefill("r", stop, start)
    for layer in range(sizes.layers):
        for read in (lambda pool: pool.k(layer), lambda pool: pool.v(layer)):  # noqa: B023 - called at once
            one, two = (read(stage.pool)[stage.table("r", 96)] for stage in (whole, cut))
            assert torch.equal(one, two)
        for kind in whole.pool.summaries:
            one, two = (stage.pool.summary(layer, kind)[stage.table("r", 96)] for stage in (whole, cut))
            assert torch.equal(one, two)
    assert equal(whole.denoise("r", 96, QUEST, 1)[0], cut.denoise("r", 96, QUEST, 1)[0])


@pytest.mark.parametrize(("weight", "density"), [(1.0, 0.8), (9.0, 0.2)])
def test_density_counts_only_the_filled_part_of_the_last_page(weight: float, density: float) -> None:
    """A page of 16 and one with 4 positions in it: selecting one of them reads 16 or 4 of 20."""

    def weighted(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = random_rows(s, name, block, step, layer)
        return q, k * (weight if block == 4 else 3.0), v

    sizes = Sizes(layers=1, heads=2, kv_heads=1, block=4, page=16)
    stage = Stage(sizes, rows=weighted)
    stage.prefill("r", 20)
    report = stage.denoise("r", 20, params("quest", budget=16), 1)[0].report
    assert report is not None and report.kv_density == pytest.approx(density)
    assert report.kv_bytes == 20 * density * 2 * sizes.dim * 4


@pytest.mark.parametrize("method", METHODS)
def test_used_pages_serve_the_next_request_as_new(sizes: Sizes, method: str) -> None:
    used, fresh = Stage(sizes), Stage(sizes)
    used.prefill("loud", 96)
    dirty = set(used.tables["loud"])
    used.drop("loud")
    for stage in (used, fresh):
        for start in range(0, 52, sizes.block):  # leaves a partial page where a page holds several blocks
            stage.prefill("r", start + sizes.block, start)
    end = -(-52 // sizes.block) * sizes.block
    assert set(used.tables["r"]) <= dirty
    pairs = zip(used.denoise("r", end, params(method)), fresh.denoise("r", end, params(method)), strict=True)
    assert all(equal(a, b) for a, b in pairs)

"""LoSA plus: what its support holds, how its remainder moves, which rows it recomputes, and what all that costs."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from losa_runtime.attention.questions import RowGroup
from losa_runtime.core.batch import ForwardMode, Segment, SparseParams
from losa_runtime.sparse import losa_plus
from losa_runtime.sparse.losa_plus import LosaPlus
from losa_runtime.sparse.step import DenoiseStep
from tests.sparse.stage import Result, Rows, Sizes, Stage, denoise_item, params, random_rows

PROMPT = 96


def run(sizes: Sizes, sparse: SparseParams, steps: int = 4, rows: Rows = random_rows) -> tuple[Stage, list[Result]]:
    stage = Stage(sizes, rows=rows)
    stage.prefill("r", PROMPT)
    return stage, stage.denoise("r", PROMPT, sparse, steps)


def error(results: list[Result], exact: list[Result]) -> float:
    """Largest relative error of the later steps and layers."""
    pairs = [
        (a, b) for x, y in zip(results[1:], exact[1:], strict=True) for a, b in zip(x.layers, y.layers, strict=True)
    ]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def held(stage: Stage, layer: int, slot: int = 0) -> list[list[int]]:
    method = stage.methods["losa_plus"]
    assert isinstance(method, LosaPlus)
    kv = method._support.lists(layer, [slot], (False,))
    ends = kv.indptr.tolist()
    return [kv.indices[a:b].tolist() for a, b in pairwise(ends)]


def still(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that never change; K/V of the block do."""
    return random_rows(s, name, block, 0, layer)[0], *random_rows(s, name, block, step, layer)[1:]


@pytest.mark.parametrize("budget", [16, 48])
@pytest.mark.parametrize("granule", ["token", "page"])
def test_support_and_remainder_together_are_dense(sizes: Sizes, budget: int, granule: str) -> None:
    """With unchanged queries nothing is lost at any budget; rows are forced to recompute from the two parts."""
    sparse = params("losa_plus", budget=budget, granule=granule)
    stage, exact = run(sizes, params("dense"), 2, still)
    stage.denoise("r", PROMPT, sparse, 1)
    stage.methods["losa_plus"].memory.query(0, torch.zeros(())).zero_()
    stage.methods["losa_plus"].memory.query(1, torch.zeros(())).zero_()
    again = stage.forward(denoise_item("r", PROMPT, sparse, 1, 0, sizes))[0]
    assert again.report is not None and again.report.active_rows == sizes.block
    for mine, other in zip(again.layers, exact[1].layers, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-6)


def test_without_change_nothing_is_read(sizes: Sizes) -> None:
    _, results = run(sizes, params("losa_plus"), 3, still)
    for result in results[1:]:
        assert result.report is not None
        assert result.report.active_rows == result.report.kv_bytes == result.report.metadata_bytes == 0


def test_the_support_is_what_some_row_gives_most(sizes: Sizes) -> None:
    """One row alone looks at one key: the mean over the block would miss it, the maximum does not."""

    def one_needle(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = random_rows(s, name, block, step, layer)
        needle = torch.nn.functional.one_hot(torch.tensor(3), s.dim).float()
        if block == 2:
            k[1] = 6 * needle
        q[..., 3] = 0
        if block == PROMPT // s.block:
            q[5 % s.block] = 6 * needle
        return q, k, v

    stage, _ = run(sizes, params("losa_plus"), 1, one_needle)
    for layer in range(sizes.layers):
        for positions in held(stage, layer):
            assert 2 * sizes.block + 1 in positions and positions == sorted(set(positions)) and len(positions) <= 16


def test_the_remainder_moves_with_the_query() -> None:
    """Errors at a tight budget: a remainder is worth much, and moving its weight is worth more than keeping it."""
    sizes = Sizes()
    exact = run(sizes, params("dense"))[1]
    with_it = error(run(sizes, params("losa_plus"))[1], exact)
    without = error(run(sizes, params("losa_plus", remainder=False))[1], exact)
    assert with_it < 0.5 * without


def test_the_remainders_weight_is_a_lower_bound_to_first_order() -> None:
    """L(q') >= L(q) + scale (q' - q) . k for the mean key of the whole remainder, equal up to second order."""
    sizes = Sizes(layers=1)
    stage, _ = run(sizes, params("losa_plus"), 1)
    method = stage.methods["losa_plus"]
    assert isinstance(method, LosaPlus)
    keys = stage.backend.prefix_keys(0, _segment(stage))
    q = random_rows(sizes, "r", PROMPT // sizes.block, 0, 0)[0]
    place = torch.arange(sizes.block)
    _, at_zero = method._remainder.read(0, place)
    mean_key = method._mean_key.of_layer(0, q).flatten(0, 1)[place]
    share = sizes.heads // sizes.kv_heads
    for size, slack in ((0.0, 1e-4), (0.01, 1e-3), (1.0, math.inf)):
        moved = q + size * torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
        for head in range(sizes.heads):
            outside = torch.ones(PROMPT, dtype=torch.bool)
            outside[held(stage, 0)[head // share]] = False
            true = torch.logsumexp(moved[:, head] @ keys[head // share][outside].T * sizes.dim**-0.5, -1)
            got = at_zero[:, head] + sizes.dim**-0.5 * (moved[:, head] * mean_key[:, head]).sum(-1)
            assert bool((got <= true + 1e-4).all()) and bool((true - got <= slack).all())


def _segment(stage: Stage) -> Segment:
    return Segment(ForwardMode.OPEN, 0, stage.sizes.block, PROMPT, stage.table("r", PROMPT), 0)


def test_change_adds_up_until_a_row_is_refreshed() -> None:
    """Each step moves by less than the tolerance; measured from the last refresh the row becomes active in time."""
    sizes = Sizes(layers=1)

    def creep(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = random_rows(s, name, block, 0, layer)
        if block == PROMPT // s.block:
            q[2] = q[2] * (1 + 0.03 * step)
        return q, k, v

    _, results = run(sizes, params("losa_plus"), 6, creep)
    active = [result.report.row_shares[2] for result in results if result.report is not None]
    assert active == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert all(r.report is not None and r.report.active_rows == r.report.row_shares[2] for r in results[1:])


@pytest.mark.parametrize(("spread", "pages"), [(1, 2), (4, 8), (64, 12)])
def test_candidates_and_their_cost(monkeypatch: pytest.MonkeyPatch, spread: int, pages: int) -> None:
    monkeypatch.setattr(losa_plus, "LEAST_PAGES", 1)
    sizes = Sizes()
    stage, results = run(sizes, params("losa_plus", spread=spread), 1)
    report = results[0].report
    assert report is not None
    assert report.metadata_bytes == sizes.layers * pages * sizes.page * sizes.kv_heads * sizes.dim * 4
    assert all(len({at // sizes.page for at in positions}) <= pages for positions in held(stage, 0))


def test_little_mass_stays_outside() -> None:
    few, many = (run(Sizes(), params("losa_plus", budget=48, least_mass=least), 1)[0] for least in (0.05, 0.0))
    assert all(len(a) < len(b) == 48 and set(a) <= set(b) for a, b in zip(held(few, 0), held(many, 0), strict=True))


def test_release_frees_the_lists() -> None:
    stage, _ = run(Sizes(), params("losa_plus"), 1)
    stage.methods["losa_plus"].release(0)
    with pytest.raises(AssertionError, match="without an opening step"):
        held(stage, 0)


def late_needle(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """From step 1 on, one row looks at a key that nobody looked at in the first step."""
    q, k, v = random_rows(s, name, block, 0, layer)
    needle = torch.nn.functional.one_hot(torch.tensor(3), s.dim).float()
    q[..., 3] = 0
    k[..., 3] = -1
    if block == 2:
        k[1] = 6 * needle
    if block == PROMPT // s.block and step:
        q[1] = 6 * needle
    return q, k, v


def test_a_row_that_moved_far_searches_and_finds(sizes: Sizes) -> None:
    exact = run(sizes, params("dense"), 3, late_needle)[1]
    stage, results = run(sizes, params("losa_plus"), 3, late_needle)
    blind = run(sizes, params("losa_plus", novelty=0.0), 3, late_needle)[1]
    assert all(2 * sizes.block + 1 in positions for positions in held(stage, 0))
    assert error(results, exact) < 0.02 < error(blind, exact)
    read = [result.report.metadata_bytes for result in results if result.report is not None]
    pages = -(-PROMPT // sizes.page)
    assert read[1] == sizes.layers * 2 * pages * sizes.kv_heads * sizes.dim * 4 and read[2] == 0
    assert all(result.report is not None and result.report.metadata_bytes == 0 for result in blind[1:])


def test_only_masked_rows_search(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes()
    for masked, found in (((0, 1), True), ((0, 2), False), (None, True)):
        monkeypatch.setattr(DenoiseStep, "masked_SB", property(lambda step, m=masked: _flags(sizes, m)))
        stage, _ = run(sizes, params("losa_plus"), 2, late_needle)
        assert (2 * sizes.block + 1 in held(stage, 0)[0]) == found


def _flags(sizes: Sizes, masked: tuple[int, ...] | None) -> Tensor:
    return torch.tensor([[masked is None or offset in masked for offset in range(sizes.block)]])


def test_a_step_knows_the_masked_rows() -> None:
    segments = [
        Segment(ForwardMode.OPEN, 0, 4, 0, torch.empty(0), 0, 0, params("dense"), masked=(1, 3)),
        Segment(ForwardMode.OPEN, 4, 8, 0, torch.empty(0), 1, 0, params("dense")),
    ]
    step = DenoiseStep(RowGroup.of(segments, 4, torch.device("cpu")), torch.device("cpu"))
    assert step.masked_SB.tolist() == [[False, True, False, True], [True] * 4]

"""What the options of LoSA and QUEST promise: laws of all combinations, then each option's own idea."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from losa_runtime.core.batch import SparseParams
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import DiffusionParams
from tests.sparse.stage import Result, Rows, Sizes, Stage, params, random_rows
from tests.sparse.test_resolve import settled

PROMPT = 96
TABLE: dict[str, list[Any]] = {
    "share": ["max", "mean", "none"],
    "pages": ["union", "own"],
    "granularity": ["layer", "head"],
    "reference": ["step", "refresh"],
    "first_step": ["dense", "sparse"],
    "dense_layers": [0, 1],
}
COMBINATIONS = [dict(zip(TABLE, values, strict=True)) for values in product(*TABLE.values())]
SOME = random.Random(0).sample(COMBINATIONS, 16)
LISTS = [{"share": share, "pages": pages} for share in TABLE["share"] for pages in TABLE["pages"]]


def run(sizes: Sizes, sparse: SparseParams, steps: int = 4, rows: Rows = random_rows) -> list[Result]:
    stage = Stage(sizes, rows=rows)
    stage.prefill("r", PROMPT)
    return stage.denoise("r", PROMPT, sparse, steps)


def distance(left: Result, right: Result) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left.layers, right.layers, strict=True))


def changed(left: Result, right: Result, layer: int = 0) -> list[tuple[int, int]]:
    """(row, query head) where two results differ."""
    differs_RH = (left.layers[layer] != right.layers[layer]).any(-1)
    return [(row, head) for row, head in differs_RH.nonzero().tolist()]


def still(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same queries and in-block keys in every step."""
    return random_rows(s, name, block, 0, layer)


def test_a_full_budget_with_all_rows_is_dense_whatever_is_chosen(sizes: Sizes) -> None:
    dense = run(sizes, params("dense"))
    for options in SOME:
        for mine, exact in zip(run(sizes, params("losa", PROMPT, sizes.block, **options)), dense, strict=True):
            assert distance(mine, exact) < 2e-6, options


def test_no_active_rows_freeze_what_the_first_step_found(sizes: Sizes) -> None:
    for options in SOME:
        first, *later = run(sizes, params("losa", active=0, **options), rows=still)
        assert all(distance(result, first) == 0.0 for result in later), options
        read = [result.report.kv_density for result in later if result.report is not None]
        assert read == [options["dense_layers"] / sizes.layers] * 3


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("lists", LISTS)
def test_all_rows_active_is_quest_after_the_first_step(sizes: Sizes, lists: dict[str, Any], granularity: str) -> None:
    losa = run(sizes, params("losa", active=sizes.block, granularity=granularity, **lists))
    quest = run(sizes, params("quest", **lists))
    assert distance(losa[0], quest[0]) > 0.0
    for mine, other in zip(losa[1:], quest[1:], strict=True):
        assert distance(mine, other) == 0.0
        assert mine.report is not None and other.report is not None and mine.report[1:] == other.report[1:]


@pytest.mark.parametrize("lists", LISTS)
def test_both_methods_open_alike_if_told_so(sizes: Sizes, lists: dict[str, Any]) -> None:
    for how in ("dense", "sparse"):
        losa, quest = (run(sizes, params(name, first_step=how, **lists), 1)[0] for name in ("losa", "quest"))
        assert distance(losa, quest) == 0.0
        assert losa.report is not None and quest.report is not None and losa.report[1:] == quest.report[1:]
        assert losa.report.dense == (how == "dense")


def test_a_refresh_in_every_step_is_dense(sizes: Sizes) -> None:
    dense = run(sizes, params("dense"))
    for options in SOME:
        mine = run(sizes, params("losa", active=0, refresh_every=1, **options))
        exact = [distance(*pair) < 2e-6 for pair in zip(mine, dense, strict=True)]
        assert exact == [options["first_step"] == "dense", True, True, True], options
        assert all(result.report is not None and result.report.dense for result in mine[1:])


def test_a_refresh_now_and_then_makes_later_steps_exact_again(sizes: Sizes) -> None:
    dense, mine = run(sizes, params("dense"), 6), run(sizes, params("losa", refresh_every=2), 6)
    assert [distance(*pair) < 2e-6 for pair in zip(mine, dense, strict=True)] == [True, False] * 3
    reports = [result.report for result in mine if result.report is not None]
    assert [report.dense for report in reports] == [True, False] * 3
    assert [report.metadata_bytes == 0 for report in reports] == [True, False] * 3
    assert [report.active_rows for report in reports] == [sizes.block, 3] * 3


def test_dense_layers_are_exact_and_leave_the_others_as_they_are(sizes: Sizes) -> None:
    dense = run(sizes, params("dense"))
    for method in ("quest", "losa"):
        plain, mine = (run(sizes, params(method, dense_layers=count)) for count in (0, 1))
        for exact, free, result in zip(dense, plain, mine, strict=True):
            assert torch.equal(result.layers[0], exact.layers[0]) and torch.equal(result.layers[1], free.layers[1])
            assert result.report is not None and free.report is not None
            assert free.report.kv_density <= result.report.kv_density
        last, free = mine[-1].report, plain[-1].report
        assert last is not None and free is not None and not last.dense
        assert last.metadata_bytes * sizes.layers == free.metadata_bytes


def drifting(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row 2 goes on by 0.3 in every step; row 6 jumps to and fro by 1.0."""
    q, k, v = random_rows(s, name, block, 0, layer)
    q[2] += 0.3 * step
    q[6] += 1.0 * (step % 2)
    return q, k, v


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize(("kind", "value"), [("count", 1), ("tau", 0.5)])
def test_measuring_from_the_last_refresh_bounds_the_drift(granularity: str, kind: str, value: float) -> None:
    sizes, steps, share = Sizes(layers=1), 9, {"granularity": granularity}
    dense = run(sizes, params("dense"), steps, drifting)
    stale = []
    for reference in ("step", "refresh"):
        sparse = params("losa", PROMPT, value, kind, reference=reference, **share)
        results = run(sizes, sparse, steps, drifting)
        rows = [(a.layers[0] - b.layers[0])[2].abs().max() for a, b in zip(results, dense, strict=True)]
        stale.append([float(error) > 2e-6 for error in rows])
    assert stale[0] == [False] + [True] * 8  # the jumping row always wins
    # 4 * 0.3 is more than 1.0; in the step after it the other row is where it was refreshed last.
    assert stale[1] == [False, True, True, True, False, False, True, True, True]


def one_head_moves(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """In step 1 row 3 changes in query head 4 alone."""
    q, k, v = random_rows(s, name, block, 0, layer)
    if step:
        q[3, 4] += 2.0
    return q, k, v


def test_only_active_heads_are_replaced_and_choose_pages() -> None:
    """Three query heads share a KV head; pages leave much out, so whatever is recomputed differs from dense."""
    sizes = Sizes(layers=1)
    found = {}
    for granularity in ("layer", "head"):
        sparse = params("losa", active=0.5, kind="tau", granularity=granularity, share="none")
        first, second = run(sizes, sparse, 2, one_head_moves)
        assert second.report is not None and second.report.active_rows == 1
        found[granularity] = (changed(first, second), second.report)
    assert found["layer"][0] == [(3, head) for head in range(sizes.heads)]
    assert found["head"][0] == [(3, 4)]
    assert found["layer"][1].kv_density_q == pytest.approx(16 / PROMPT)
    assert found["head"][1].kv_density_q == pytest.approx(16 / PROMPT / sizes.heads)
    assert found["head"][1].kv_density == pytest.approx(16 / PROMPT / sizes.kv_heads)
    assert found["head"][1].metadata_bytes == found["layer"][1].metadata_bytes > 0


def test_each_head_has_as_many_active_rows_as_the_rule_says() -> None:
    def crossed(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = random_rows(s, name, block, 0, layer)
        for head in range(s.heads):
            q[(head, head + 1), head] += step
        return q, k, v

    sizes = Sizes(layers=1)
    first, second = run(sizes, params("losa", active=2, granularity="head"), 2, crossed)
    assert sorted(changed(first, second)) == [(r, h) for r in range(8) for h in range(6) if r - h in (0, 1)]
    assert second.report is not None and second.report.active_rows == 7


@pytest.mark.parametrize(
    ("method", "options", "field", "allowed"),
    [
        ("losa", {"share": "least"}, "share", "'max', 'mean' or 'none'"),
        ("losa", {"granularity": "row"}, "granularity", "'layer' or 'head'"),
        ("losa", {"refresh_every": -1}, "refresh_every", "greater than or equal to 0"),
        ("losa", {"dense_layers": 1.5}, "dense_layers", "integer"),
        ("quest", {"first_step": True}, "first_step", "'sparse' or 'dense'"),
        ("quest", {"granularity": "head"}, "granularity", "share, pages, dense_layers, first_step"),
    ],
)
def test_other_values_are_refused_by_name(method: str, options: dict[str, Any], field: str, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        settled({"sparse_method": method, "sparse_options": options})
    assert caught.value.field == f"custom_params.sparse_options.{field}" and allowed in caught.value.allowed
    assert DiffusionParams(sparse_options=options).sparse_options == options

"""FlashBlock's own idea: a block's prefix attention grows old by the tokens that were unmasked, not by steps."""

from __future__ import annotations

import pytest
import torch

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.resolve import resolve
from tests.sparse.oracle import block_outputs
from tests.sparse.spy import watch
from tests.sparse.stage import Result, Sizes, Stage, denoise_item, params

PROMPT = 80


def run(sizes: Sizes, method: str, unmasked: list[int] | None = None, active: int = 3, **options: int) -> list[Result]:
    stage, steps = Stage(sizes), 5 if unmasked is None else len(unmasked)
    stage.prefill("r", PROMPT)
    return stage.denoise("r", PROMPT, params(method, active=active, **options), steps, unmasked=unmasked)


def same(left: list[Result], right: list[Result]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x.layers, y.layers, strict=True))


def refreshes(results: list[Result]) -> list[bool]:
    """Which steps read everything; the others read nothing."""
    reports = [result.report for result in results if result.report is not None]
    assert all(report.kv_bytes == (report.dense_bytes if report.dense else 0) for report in reports)
    assert all(report.metadata_bytes == 0 and not report.bypassed for report in reports)
    return [report.dense for report in reports]


def test_a_refresh_in_every_step_is_dense(sizes: Sizes) -> None:
    results = run(sizes, "flashblock", refresh_tokens=0)
    assert same(results, run(sizes, "dense")) and all(refreshes(results))
    assert same(run(sizes, "flashblock", [0, 0, 0, 0], refresh_tokens=0), run(sizes, "dense", [0, 0, 0, 0]))


def test_no_refresh_is_losa_without_active_rows(sizes: Sizes) -> None:
    results = run(sizes, "flashblock", refresh_tokens=10**6)
    assert same(results, run(sizes, "losa", active=0))
    assert refreshes(results) == [True, False, False, False, False]
    assert not same(results, run(sizes, "dense"))


@pytest.mark.parametrize(
    ("refresh_tokens", "unmasked", "expected"),
    [
        (1, [0, 1, 2, 3], [1, 1, 1, 1]),
        (1, [0, 0, 1, 1, 2], [1, 0, 1, 0, 1]),
        (2, [0, 1, 2, 3, 4], [1, 0, 1, 0, 1]),
        (2, [0, 1, 4, 5, 6], [1, 0, 1, 0, 1]),  # counted from the refresh, whatever the steps in between accepted
        (3, [0, 2, 4, 5, 7], [1, 0, 1, 0, 1]),
        (4, [2, 5, 6, 9, 10], [1, 0, 1, 0, 1]),  # the first step need not start from nothing
        (4, [0, 1, 2, 3, 4], [1, 0, 0, 0, 1]),
    ],
)
def test_refreshes_count_unmasked_tokens(refresh_tokens: int, unmasked: list[int], expected: list[int]) -> None:
    results = run(Sizes(), "flashblock", unmasked, refresh_tokens=refresh_tokens)
    assert refreshes(results) == [bool(each) for each in expected]


@pytest.mark.parametrize(("refresh_tokens", "unmasked"), [(3, [0, 2, 4, 5, 8]), (2, [0, 1, 4, 5, 6])])
def test_results_are_those_of_the_last_refresh(sizes: Sizes, refresh_tokens: int, unmasked: list[int]) -> None:
    stage, sparse = Stage(sizes), params("flashblock", refresh_tokens=refresh_tokens)
    stage.prefill("r", PROMPT)
    want = block_outputs(stage, "r", PROMPT, sparse, len(unmasked), unmasked)
    for got, expected in zip(run(sizes, "flashblock", unmasked, refresh_tokens=refresh_tokens), want, strict=True):
        for mine, oracle in zip(got.layers, expected, strict=True):
            torch.testing.assert_close(mine.double(), oracle, rtol=1e-4, atol=2e-6)


def test_each_block_of_a_forward_has_a_count_of_its_own(sizes: Sizes) -> None:
    """First steps, refreshes and reuse in one forward; each request gets the bits that it gets alone."""
    sparse, stage = params("flashblock", refresh_tokens=3), Stage(sizes)
    counts = {"a": [0, 1, 3, 4], "b": [0, 3, 4, 5], "c": [0, 1, 2, 7]}
    for name in counts:
        stage.prefill(name, PROMPT)
    plans = watch(stage)
    together = [
        stage.forward(
            *(
                denoise_item(name, PROMPT, sparse, step, slot, sizes, counts[name][step])
                for slot, name in enumerate(counts)
            )
        )
        for step in range(4)
    ]
    b, read = sizes.block, [None if plan.rows is None else plan.rows.tolist() for plan in plans]
    assert read == [None, list(range(b, 2 * b)), list(range(b)), list(range(2 * b, 3 * b))]
    for place, (name, unmasked) in enumerate(counts.items()):
        alone = Stage(sizes, seed=3)
        alone.prefill(name, PROMPT)
        assert same([step[place] for step in together], alone.denoise(name, PROMPT, sparse, 4, 5, unmasked))


def test_the_next_block_starts_to_count_anew() -> None:
    stage, sparse = Stage(), params("flashblock", refresh_tokens=3)
    stage.prefill("r", PROMPT)
    stage.denoise("r", PROMPT, sparse, 2, unmasked=[0, 6])
    stage.methods["flashblock"].release(0)
    assert not stage.methods["flashblock"]._refreshed  # type: ignore[attr-defined]
    assert refreshes(stage.denoise("r", PROMPT, sparse, 3, unmasked=[0, 2, 3])) == [True, False, True]


def test_a_budget_is_refused() -> None:
    wanted = DiffusionParams(sparse_method="flashblock", token_budget=64)
    with pytest.raises(InvalidRequest, match=r"custom_params.token_budget: found 64, allowed: absent"):
        resolve(wanted, EngineConfig.parse(model="m"), Stage().geometry)

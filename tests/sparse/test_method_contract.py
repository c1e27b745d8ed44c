"""What every sparse method owes, seven clauses, each asked of every method in the table and of choices of options."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from losa_runtime.attention.questions import PrefixPlan, PrefixState, RowGroup
from losa_runtime.core.batch import SparseParams
from losa_runtime.sparse.method import METHODS, method_class
from tests.sparse.cases import ALL
from tests.sparse.choices import CASES, CHOICES, usual
from tests.sparse.conftest import SHAPES
from tests.sparse.oracle import block_outputs
from tests.sparse.spy import as_known
from tests.sparse.stage import Result, Sizes, Stage, denoise_item, params

PROMPT, STEPS = 80, 4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every method (by name) in every shape, every choice (method/choice) in one of them: in the others it is slow."""
    if "method" not in metafunc.fixturenames:
        return
    asked = [pytest.param(name, sizes, id=f"{shape}-{name}") for shape, sizes in SHAPES.items() for name in METHODS]
    for index, name in enumerate(CHOICES):
        for number, (shape, sizes) in enumerate(SHAPES.items()):
            marks = () if number == index % len(SHAPES) else (pytest.mark.slow,)
            asked.append(pytest.param(name, sizes, id=f"{shape}-{name}", marks=marks))
    metafunc.parametrize(("method", "sizes"), asked)


def run(sizes: Sizes, sparse: SparseParams, prompt: int = PROMPT, seed: int = 0) -> list[Result]:
    stage = Stage(sizes, seed=seed)
    stage.prefill("r", prompt)
    return stage.denoise("r", prompt, sparse, STEPS)


def same(left: list[Result], right: list[Result]) -> bool:
    pairs = [(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x.layers, y.layers, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def close(left: list[Result], right: list[Result]) -> None:
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x.layers, y.layers, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("prompt", [0, 16, PROMPT])
def test_1_full_budget_with_all_rows_is_dense(sizes: Sizes, method: str, prompt: int) -> None:
    full = usual(method, budget=PROMPT, active=sizes.block, **CASES[method].full)
    close(run(sizes, full, prompt), run(sizes, params("dense"), prompt))


@pytest.mark.parametrize("more", [0, 1])
def test_results_are_those_of_the_paper(sizes: Sizes, method: str, more: int) -> None:
    """All steps and layers against the loops of the oracle, with a selection that leaves most pages out.

    One block more leaves the last page partly filled where a page holds several blocks.
    """
    stage, sparse, start = Stage(sizes), usual(method, budget=16), PROMPT + more * sizes.block
    stage.prefill("r", start)
    want = block_outputs(stage, "r", start, sparse, STEPS)
    for got, expected in zip(stage.denoise("r", start, sparse, STEPS), want, strict=True):
        for mine, oracle in zip(got.layers, expected, strict=True):
            torch.testing.assert_close(mine.double(), oracle, rtol=1e-4, atol=2e-6)


def test_2_rows_and_indices_are_in_range_sorted_and_unique(sizes: Sizes, method: str) -> None:
    stage, seen = Stage(sizes), []
    ask = stage.backend.prefix

    def spy(layer: int, q: Tensor, plan: PrefixPlan, group: RowGroup) -> PrefixState:
        seen.append((as_known(plan), group))
        return ask(layer, q, plan, group)

    stage.backend.prefix = spy  # type: ignore[method-assign]
    for name, prompt in (("a", PROMPT), ("b", 48), ("c", 0)):
        stage.prefill(name, prompt)
    for step in range(STEPS):
        stage.forward(
            *(
                denoise_item(name, prompt, usual(method), step, slot, sizes)
                for slot, (name, prompt) in enumerate((("a", PROMPT), ("b", 48), ("c", 0)))
            )
        )
    assert len(seen) == STEPS * sizes.layers + sizes.layers * (CASES[method].again > 0)
    for plan, group in seen:
        rows = list(range(3 * sizes.block)) if plan.known_rows is None else plan.known_rows.tolist()
        assert all(0 <= a < b for a, b in pairwise([*rows, 3 * sizes.block]))
        if plan.kv is None:
            continue
        ends, owners = plan.kv.indptr.tolist(), [row // sizes.block for row in rows] if plan.kv.per_row else [0, 1, 2]
        assert ends[0] == 0 and ends[-1] == len(plan.kv.indices) and len(ends) == len(owners) * plan.kv.heads + 1
        for entry, (first, last) in enumerate(pairwise(ends)):
            owner = owners[entry // plan.kv.heads]
            granules = -(-group.prefix_lens[owner] // plan.granule)
            listed = plan.kv.indices[first:last].tolist()
            assert all(0 <= a < b for a, b in pairwise([*listed, granules]))
            assert not (plan.kv.whole[owner] and listed)


def test_3_nothing_uncommitted_is_read(sizes: Sizes, method: str) -> None:
    """The pool is NaN wherever nothing was stored, including pages the request holds for later."""
    stage, prompt = Stage(sizes), 5 * sizes.block
    stage.prefill("r", prompt)
    stage.table("r", prompt + 3 * sizes.page)
    for result in stage.denoise("r", prompt, usual(method), STEPS):
        assert all(bool(out.isfinite().all()) for out in result.layers)


def test_4_deterministic_and_blind_to_page_numbers(sizes: Sizes, method: str) -> None:
    first = run(sizes, usual(method))
    assert same(first, run(sizes, usual(method)))
    assert same(first, run(sizes, usual(method), seed=7))


def test_5_release_leaves_nothing(sizes: Sizes, method: str) -> None:
    stage, sparse = Stage(sizes), usual(method)
    for name in ("old", "r"):
        stage.prefill(name, PROMPT)
    stage.denoise("old", PROMPT, sparse, 2)
    for one in stage.methods.values():
        one.release(0)
    if CASES[method].keeps_state:
        with pytest.raises(AssertionError, match="without an opening step"):
            stage.forward(denoise_item("r", PROMPT, sparse, 1, 0, sizes))
    assert same(stage.denoise("r", PROMPT, sparse, STEPS), run(sizes, sparse))


def test_6_independent_of_neighbours(sizes: Sizes, method: str) -> None:
    """In company of other prompts, budgets, active rules and phases: the same bits as alone."""
    company = {
        "r": (PROMPT, usual(method), 0),
        "x": (32, usual(method, budget=32, active=0.5, kind="tau"), 1),
        "y": (0, usual(method, active=0), 2),
        "z": (96, usual(method, budget=48, active=1.0, kind="ratio"), 0),
    }
    stage = Stage(sizes)
    for name, (prompt, _, _) in company.items():
        stage.prefill(name, prompt)
    together: dict[str, list[Result]] = {name: [] for name in company}
    for turn in range(STEPS + 2):
        now = [
            (name, denoise_item(name, prompt, sparse, turn - late, slot, sizes))
            for slot, (name, (prompt, sparse, late)) in enumerate(company.items())
            if 0 <= turn - late < STEPS
        ]
        for (name, _), result in zip(now, stage.forward(*(item for _, item in now)), strict=True):
            together[name].append(result)
    for name, (prompt, sparse, _) in company.items():
        alone = Stage(sizes, seed=3)
        alone.prefill(name, prompt)
        results = alone.denoise(name, prompt, sparse, STEPS, slot=5)
        assert same(together[name], results), name
        for mine, other in zip(together[name], results, strict=True):
            assert mine.report is not None and other.report is not None
            assert mine.report[1:] == other.report[1:]


def test_7_reports_what_was_read(sizes: Sizes, method: str) -> None:
    results = run(sizes, usual(method))
    reports = [result.report for result in results if result.report is not None]
    assert len(reports) == STEPS
    itemsize, vector = 4, sizes.kv_heads * sizes.dim
    for step, report in enumerate(reports):
        assert 0.0 <= report.kv_density_q <= report.kv_density <= 1.0 and not report.bypassed
        assert report.kv_density_q > 0.0 or (CASES[method].rests and step)
        everything = report.kv_density == 1.0 and report.active_rows == sizes.block
        assert report.dense == everything or (everything and not CASES[method].alike)
        again = CASES[method].again if step == 0 else 0
        read = (report.kv_density * PROMPT + again) * sizes.layers
        assert report.kv_bytes == pytest.approx(2 * read * vector * itemsize, abs=1)
        assert report.dense_bytes == 2 * PROMPT * sizes.layers * vector * itemsize
    case, pages = CASES[method], -(-PROMPT // sizes.page)
    vectors = {"nothing": 0, "summaries": 2 * pages, "keys": PROMPT}
    chosen = case.opening - 1
    parts = (("nothing", reports[:chosen]), (case.first, [reports[chosen]]), (case.later, reports[chosen + 1 :]))
    for kind, some in parts:
        if kind is not None:
            count = kind if isinstance(kind, int) else vectors[kind]
            want = count * vector * itemsize * sizes.layers
            assert all(report.metadata_bytes == want for report in some)
    assert all(report.dense == case.opens_dense for report in reports[: case.opening])
    assert reports[-1].dense == (method == "dense")
    if case.active is not None:
        active = sizes.block if case.active == ALL else case.active
        assert all(report.active_rows == active for report in reports[1:])
    has_budget = method_class(method.partition("/")[0]).has_budget
    small = run(sizes, usual(method), prompt=16)[1].report
    assert small is not None and small.bypassed == has_budget and small.metadata_bytes == 0

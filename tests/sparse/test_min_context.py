"""From which prefix on a method pays, by measured costs: the rule never chooses what the model says is slower."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from losa_runtime.core.batch import ActiveRule, SparseParams
from losa_runtime.sparse.method import MethodOptions
from losa_runtime.sparse.min_context import MARGIN, NEVER, Line, MethodCosts, MinContext

SECONDS = st.floats(0.0, 0.1)
SLOPES = st.floats(0.0, 1e-4)
LINES = st.builds(Line, SECONDS, SLOPES)


def params(method: str = "losa", budget: int = 256) -> SparseParams:
    return SparseParams(method, budget, ActiveRule("count", 5), MethodOptions(), 16)


def seconds(line: Line, n: int) -> float:
    return line.base + line.slope * n


def test_a_given_number_is_the_rule_for_every_method_but_dense() -> None:
    rule = MinContext(4096)
    assert rule.of(params(budget=8192), 16) == 4096 and rule.of(params("mage"), 1) == 4096
    assert rule.of(params("dense"), 16) == 0 and MinContext(0).of(params(), 16) == 0


def test_the_crossing_of_known_costs() -> None:
    # Dense: 1 ms and 1 ms per 1,000 tokens. LoSA: a first step like it, later ones 3 ms whatever the prefix.
    dense = Line(1e-3, 1e-6)
    rule = MinContext(None, 16, dense, {"losa": MethodCosts(dense, Line(3e-3, 0.0), 256, 0.0)})
    found = rule.of(params(), 16)
    # first + 15 later = 0.94 * 16 dense: 46 + n / 1000 = 15.04 + 15.04 n / 1000, in ms.
    assert found == 2206
    assert rule.of(params(), 2) > found, "a first step that is no faster weighs more in a short block"
    assert rule.of(params(budget=8192), 16) == 8193, "a prefix within the budget leaves nothing to choose"


def test_a_larger_budget_costs_what_was_measured_for_it() -> None:
    dense = Line(1e-3, 1e-6)
    rule = MinContext(None, 16, dense, {"losa": MethodCosts(dense, Line(2e-3, 0.0), 256, 1e-6)})
    cheap, same, dear = (rule.of(params(budget=budget), 16) for budget in (16, 256, 1024))
    assert cheap < same < dear


def test_a_request_with_more_active_rows_costs_what_was_measured_for_them() -> None:
    dense = Line(1e-3, 1e-6)
    rule = MinContext(None, 16, dense, {"losa": MethodCosts(dense, Line(2e-3, 0.0), 256, 0.0, 5, 1e-4)})
    rules = (("count", 2.0), ("count", 5.0), ("ratio", 0.5), ("count", 16.0))
    few, same, half, every = (rule.of(params()._replace(active=ActiveRule(*each)), 16) for each in rules)
    assert few < same < half < every
    assert rule.of(params()._replace(active=ActiveRule("tau", 0.5)), 16) == every, "it may be all rows"
    plain = rule.methods["losa"]._replace(rows=0, per_row=0.0)
    assert MinContext(None, 16, dense, {"losa": plain}).of(params(), 16) == same


def test_what_is_never_faster_is_never_used() -> None:
    dense = Line(1e-3, 1e-6)
    for later in (dense, Line(2e-3, 1e-6), Line(0.9e-3, 1.1e-6)):
        rule = MinContext(None, 16, dense, {"quest": MethodCosts(dense, later, 256, 0.0)})
        assert rule.of(params("quest"), 16) == NEVER


def test_a_method_without_a_budget_may_pay_from_the_start() -> None:
    rule = MinContext(None, 16, Line(2e-3, 1e-6), {"flashblock": MethodCosts(Line(2e-3, 1e-6), Line(1e-3, 0.0))})
    assert rule.of(params("flashblock", budget=4096), 16) == 0


def test_a_gain_next_to_none_pays_never_or_always() -> None:
    tiny = 2.225073858507203e-309
    for base, least in ((0.0625, NEVER), (-0.0625, 0)):
        dense, later = Line(0.5, tiny), Line(0.0, tiny)
        costs = MethodCosts(Line(6 * 0.5 * (1 - MARGIN) + base, 0.0), later)
        assert MinContext(None, 16, dense, {"flashblock": costs}).of(params("flashblock"), 6) == least


def test_a_line_never_falls() -> None:
    assert Line.through((1000, 2e-3), (2000, 3e-3)) == Line(1e-3, 1e-6)
    flat = Line.through((1000, 3e-3), (2000, 2e-3))
    assert flat.slope == 0.0 and flat.base == 2e-3, "noise made the longer prefix look faster"


@given(LINES, LINES, LINES, SLOPES, st.integers(1, 64), st.integers(16, 4096), st.integers(0, 1 << 17))
def test_no_block_is_slower_than_a_dense_one_by_the_model(
    dense: Line, first: Line, later: Line, per_token: float, steps: int, budget: int, more: int
) -> None:
    rule = MinContext(None, 16, dense, {"losa": MethodCosts(first, later, 256, per_token)})
    least = rule.of(params(budget=budget), steps)
    if least == NEVER:
        return
    n = least + more
    extra = per_token * (budget - 256)
    sparse = seconds(first, n) + (steps - 1) * (max(0.0, later.base + extra) + later.slope * n)
    assert sparse <= (1 - MARGIN) * steps * seconds(dense, n) * (1 + 1e-9) + 1e-12
    assert least > budget

"""The contract of every sparse method on the Triton backend, in its interpreter: small shapes, as programs are slow."""

from __future__ import annotations

import pytest

from losa_runtime.sparse.method import METHODS
from tests.kernels.platforms import INTERPRETED
from tests.sparse import stage
from tests.sparse import test_method_contract as contract
from tests.sparse.choices import CHOICES
from tests.sparse.stage import Sizes

SIZES = Sizes(layers=1, heads=2, kv_heads=1, dim=16, block=4, page=8)
TWO_LAYERS = SIZES._replace(layers=2)
ON_DEVICE = ("quest", "losa")  # whose rows or lists are chosen on the device

test_1_full_budget_with_all_rows_is_dense = contract.test_1_full_budget_with_all_rows_is_dense
test_results_are_those_of_the_paper = contract.test_results_are_those_of_the_paper
test_2_rows_and_indices_are_in_range_sorted_and_unique = contract.test_2_rows_and_indices_are_in_range_sorted_and_unique
test_3_nothing_uncommitted_is_read = contract.test_3_nothing_uncommitted_is_read
test_4_deterministic_and_blind_to_page_numbers = contract.test_4_deterministic_and_blind_to_page_numbers
test_5_release_leaves_nothing = contract.test_5_release_leaves_nothing
test_6_independent_of_neighbours = contract.test_6_independent_of_neighbours
test_7_reports_what_was_read = contract.test_7_reports_what_was_read


# Fast: what each method computes, and of the clauses about plans those that differ where the device plans.
FAST = {
    "test_results_are_those_of_the_paper": tuple(METHODS),
    "test_2_rows_and_indices_are_in_range_sorted_and_unique": ON_DEVICE,
    "test_6_independent_of_neighbours": ON_DEVICE,
    "test_7_reports_what_was_read": ON_DEVICE,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every method and every choice of options, where there is an interpreter."""
    fast, asked = FAST.get(metafunc.function.__name__, ()), []
    for name in (*METHODS, *CHOICES) if INTERPRETED else ():
        sizes = TWO_LAYERS if "dense_layers" in name else SIZES
        asked.append(pytest.param(name, sizes, id=name, marks=() if name in fast else (pytest.mark.slow,)))
    metafunc.parametrize(("method", "sizes"), asked)


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "BACKEND", "triton")

"""The contract of every sparse method on the device, and that no layer of a later step waits for it."""

from __future__ import annotations

import pytest
import torch

from losa_runtime.sparse.method import METHODS
from tests.gpu.waiting import nobody_waits
from tests.sparse import stage
from tests.sparse import test_method_contract as contract
from tests.sparse import test_never_waits as waits
from tests.sparse.choices import CHOICES
from tests.sparse.conftest import SHAPES

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")

test_1_full_budget_with_all_rows_is_dense = contract.test_1_full_budget_with_all_rows_is_dense
test_results_are_those_of_the_paper = contract.test_results_are_those_of_the_paper
test_2_rows_and_indices_are_in_range_sorted_and_unique = contract.test_2_rows_and_indices_are_in_range_sorted_and_unique
test_3_nothing_uncommitted_is_read = contract.test_3_nothing_uncommitted_is_read
test_4_deterministic_and_blind_to_page_numbers = contract.test_4_deterministic_and_blind_to_page_numbers
test_5_release_leaves_nothing = contract.test_5_release_leaves_nothing
test_7_reports_what_was_read = contract.test_7_reports_what_was_read


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "method" in metafunc.fixturenames:
        asked = [pytest.param(m, sizes, id=f"{shape}-{m}") for shape, sizes in SHAPES.items() for m in METHODS]
        asked += [pytest.param(choice, SHAPES["page=block"], id=choice) for choice in CHOICES]
        metafunc.parametrize(("method", "sizes"), asked)


@pytest.fixture(autouse=True)
def _stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "BACKEND", "triton")
    monkeypatch.setattr(stage, "DEVICE", CUDA)


@pytest.mark.parametrize("name", waits.CASES)
def test_no_layer_of_a_later_step_waits(name: str) -> None:
    case = waits.CASES[name]
    world, items = waits.stage_on(CUDA, case), waits.step_of(case, 2)
    inputs = [world.inputs(items, layer) for layer in range(waits.SIZES.layers)]
    attend, _ = world.begin(*items)
    with nobody_waits():
        for layer, some in enumerate(inputs):
            attend(layer, *some)
    assert len(attend.report()) == len(items)


def test_whoever_waits_is_found_out() -> None:
    with nobody_waits(), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(1, device=CUDA).item()

"""The contract of attention backends, and what is the Triton backend's own, on the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.attention import test_backends as contract
from tests.attention import test_triton_backend as own

pytestmark = pytest.mark.gpu

KINDS = ("triton", "torch")
make, half, pool = contract.make, contract.half, own.pool


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Tensors that nobody places lie on the device. Products of float32 are made of three on tensor cores."""
    monkeypatch.setattr(contract, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(contract, "CLOSE", {"rtol": 1e-4, "atol": 1e-5})
    torch.set_default_device("cuda")
    yield request.param
    torch.set_default_device(None)


test_whole_prefixes_of_several_requests = contract.test_whole_prefixes_of_several_requests
test_planned_rows_only = contract.test_planned_rows_only
test_lists_of_every_kind = contract.test_lists_of_every_kind
test_some_segments_whole_and_some_listed = contract.test_some_segments_whole_and_some_listed
test_prefill_is_block_causal_over_pages = contract.test_prefill_is_block_causal_over_pages
test_prefill_with_same_bits_may_be_cut_at_any_block = contract.test_prefill_with_same_bits_may_be_cut_at_any_block
test_block_attention_of_each_block = contract.test_block_attention_of_each_block
test_prefix_and_block_merge_to_one_softmax = contract.test_prefix_and_block_merge_to_one_softmax
test_fresh_states_are_merged_and_remembered_the_others_recalled = (
    contract.test_fresh_states_are_merged_and_remembered_the_others_recalled
)
test_scores_of_some_rows_with_padding = contract.test_scores_of_some_rows_with_padding
test_summary_of_a_page_filled_by_two_blocks = contract.test_summary_of_a_page_filled_by_two_blocks
test_reused_page_shows_nothing_of_its_earlier_owner = contract.test_reused_page_shows_nothing_of_its_earlier_owner
test_pages_of_16_bits_are_read_as_they_were_rounded = contract.test_pages_of_16_bits_are_read_as_they_were_rounded
test_mass_of_granules = contract.test_mass_of_granules
test_parts_are_merged_where_they_are_used = own.test_parts_are_merged_where_they_are_used
test_stored_rows_are_merged_from_parts = own.test_stored_rows_are_merged_from_parts
test_the_same_bits_whatever_the_number_of_processors = own.test_the_same_bits_whatever_the_number_of_processors
test_rows_chosen_on_the_device_go_through_a_layer = own.test_rows_chosen_on_the_device_go_through_a_layer


def test_every_test_of_the_contract_is_here() -> None:
    """But for those that are about a CPU, or about nothing that a device could change."""
    elsewhere = {
        "test_prefill_is_the_same_bits_when_cut_at_tiles",
        "test_group_of_scattered_segments_takes_and_puts_its_rows",
        "test_refusals_name_the_reason",
    }
    assert {name for name in vars(contract) if name.startswith("test_")} - elsewhere <= set(globals())

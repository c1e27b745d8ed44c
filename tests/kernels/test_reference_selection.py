"""Page bounds, top pages, unions, query change and active rows against sorting in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_kernels.reference.paging import key_bounds
from losa_kernels.reference.selection import (
    active_rows,
    page_scores,
    query_change,
    share_heads,
    share_scores,
    top_pages,
    union_rows,
)


def test_page_score_is_the_sum_of_channel_maxima_and_a_bound() -> None:
    q, keys = torch.randn(5, 6, 8), torch.randn(7, 2, 4, 8)
    bounds = key_bounds(keys, torch.full((7,), 4))
    scores = page_scores(q, bounds)
    top, bottom = (bounds[:, :, side].repeat_interleave(3, dim=1) for side in (0, 1))  # [P, H, D]
    want = torch.maximum(q[:, None] * top, q[:, None] * bottom).sum(-1).transpose(1, 2)
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-5)
    truth = torch.einsum("rhd,phsd->rhps", q, keys.repeat_interleave(3, dim=1))
    assert bool((scores[..., None] >= truth - 1e-5).all())
    assert bool((scores[..., None] - truth < 1.0).any())  # and not by being infinite


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.sampled_from([2, 8, 33])),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_key_of_a_page_exceeds_its_bound(
    seed: int, shape: tuple[int, int, int, int], scale: float, dtype: torch.dtype
) -> None:
    """Whatever the number of heads, the fill of the last page, the size and the dtype of the keys."""
    groups, share, page, dim = shape
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(4, groups * share, dim, generator=draw)
    keys = (torch.randn(3, groups, page, dim, generator=draw) * scale).to(dtype)
    filled = torch.tensor([page, page, seed % page + 1])
    scores = page_scores(q, key_bounds(keys, filled))
    truth = torch.einsum("rhd,phsd->rhps", q, keys.float().repeat_interleave(share, dim=1))
    truth.masked_fill_(torch.arange(page) >= filled[:, None], -torch.inf)
    slack = 1e-5 * scale * dim
    assert bool((scores[..., None] >= truth - slack).all())
    if page == 1:
        torch.testing.assert_close(scores, truth[..., 0], rtol=1e-4, atol=slack)


def test_bound_holds_for_rounded_keys() -> None:
    keys = torch.randn(3, 1, 4, 8).to(torch.bfloat16)
    q = torch.randn(2, 1, 8)
    scores = page_scores(q, key_bounds(keys, torch.full((3,), 4)))
    assert bool((scores[..., None] >= torch.einsum("rhd,phsd->rhps", q, keys.float()) - 1e-5).all())


def test_shared_scores_take_max_or_mean_of_the_group() -> None:
    scores = torch.tensor([[[1.0, 5.0], [3.0, 1.0], [0.0, 0.0], [2.0, -2.0]]])
    assert share_scores(scores, 2).tolist() == [[[3.0, 5.0], [2.0, 0.0]]]
    assert share_scores(scores, 2, "mean").tolist() == [[[2.0, 3.0], [1.0, -1.0]]]
    assert torch.equal(share_scores(scores, 2, "none"), scores)


def test_only_some_heads_share() -> None:
    scores = torch.tensor([[[1.0, 5.0], [3.0, 1.0], [7.0, 0.0], [2.0, -2.0]]])
    some = torch.tensor([[True, False, True, True]])
    assert share_scores(scores, 2, "max", some).tolist() == [[[1.0, 5.0], [7.0, 0.0]]]
    assert share_scores(scores, 2, "mean", some).tolist() == [[[1.0, 5.0], [4.5, -1.0]]]
    assert share_heads(some & torch.tensor([False, True, True, True]), 2).tolist() == [[False, True]]
    assert torch.equal(share_heads(some, 2, "none"), some)


@pytest.mark.parametrize("heads", [3, 8, 70])
def test_a_mean_score_does_not_depend_on_rows_and_padding_beside_it(heads: int) -> None:
    scores = torch.randn(5, 2 * heads, 100)
    alone = share_scores(scores[:1, :, :37].contiguous(), 2, "mean")
    assert torch.equal(share_scores(scores, 2, "mean")[:1, :, :37], alone)


@settings(deadline=None, max_examples=60)
@given(
    scores=st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=4),
    counts=st.lists(st.integers(1, 6), min_size=4, max_size=4),
    padding=st.integers(0, 5),
)
def test_top_pages_break_ties_to_the_lowest_page(scores: list[list[int]], counts: list[int], padding: int) -> None:
    table = torch.tensor(scores, dtype=torch.float32)[:, None]
    padded = torch.nn.functional.pad(table, (0, padding), value=-torch.inf)
    chosen = top_pages(padded, torch.tensor(counts[: len(scores)]))
    for row, line in enumerate(scores):
        best = sorted(range(6), key=lambda page: (-line[page], page))[: counts[row]]
        assert chosen[row, 0].nonzero().flatten().tolist() == sorted(best)


def test_what_is_not_a_number_is_the_best_and_never_one_too_few() -> None:
    """As in the native kernel: who reads it finds out, while a page that is left out would be missed by nobody."""
    nan = torch.nan
    table = torch.tensor([[1.0, nan, 3.0, nan], [nan] * 4, [torch.inf, 2.0, nan, 1.0], [-nan, -torch.inf, 0.0, 1.0]])
    chosen = top_pages(table[:, None], torch.tensor([2, 3, 2, 2]))
    assert [row[0].nonzero().flatten().tolist() for row in chosen] == [[1, 3], [0, 1, 2], [0, 2], [0, 3]]


def test_union_is_per_segment_and_head() -> None:
    chosen = torch.zeros(3, 2, 4, dtype=torch.bool)
    chosen[0, 0, 1] = chosen[1, 0, 3] = chosen[1, 0, 1] = chosen[2, 1, 0] = True
    union = union_rows(chosen, torch.tensor([0, 0, 2]), 3)
    assert union.nonzero().tolist() == [[0, 0, 1], [0, 0, 3], [2, 1, 0]]


def test_query_change_ignores_rotation_and_is_zero_without_change() -> None:
    before = torch.randn(1, 4, 2, 8)
    now = before + torch.randn(1, 4, 2, 8) * torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None, None]
    angle = torch.randn(1, 4, 1, 4)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()), dim=-1)

    plain = query_change(now, before)
    torch.testing.assert_close(query_change(rotate(now), rotate(before)), plain, rtol=1e-5, atol=1e-6)
    assert plain[0, 0] == 0.0
    torch.testing.assert_close(plain[0, 3], ((now - before)[0, 3] ** 2).mean())
    heads = query_change(now, before, per_head=True)
    torch.testing.assert_close(query_change(rotate(now), rotate(before), per_head=True), heads, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(heads.mean(-1), plain)


def test_active_rows_by_count_break_ties_to_the_lowest_row() -> None:
    change = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    picked = active_rows(change, torch.tensor([3, 2]), torch.zeros(2))
    assert picked.tolist() == [[True, True, False, True, False], [True, True, False, False, False]]
    none_all = active_rows(change, torch.tensor([0, 5]), torch.zeros(2))
    assert not none_all[0].any() and bool(none_all[1].all())


def test_active_rows_by_share_take_the_fewest_that_cover_it() -> None:
    change = torch.tensor([[1.0, 4.0, 2.0, 1.0]] * 3 + [[0.0, 0.0, 0.0, 0.0]])
    picked = active_rows(change, torch.zeros(4, dtype=torch.int64), torch.tensor([0.5, 0.51, 1.0, 0.5]))
    assert picked[0].tolist() == [False, True, False, False]  # 4 of 8 is a half
    assert picked[1].tolist() == [False, True, True, False]
    assert bool(picked[2].all()) and not picked[3].any()

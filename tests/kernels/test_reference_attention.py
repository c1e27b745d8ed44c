"""The reference attention against plain float64 softmax, loops, and itself over other layouts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losa_kernels.reference.attention import (
    REMAINDER,
    attend,
    block_attention,
    block_causal_attention,
    fold_heads,
    listed_attention,
    merge_states,
    prefix_attention,
    remove_state,
    unfold_heads,
)
from losa_kernels.reference.paging import store_rows

SCALE = 0.25


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One query [D] over keys [N, D], in float64."""
    scores = (k.double() @ q.double()) * SCALE
    return torch.softmax(scores, 0) @ v.double(), torch.logsumexp(scores, 0)


def paged(k_NGD: Tensor, page_size: int, pages: Tensor, num_pages: int) -> Tensor:
    """Keys laid into shuffled pages; everything else is NaN."""
    cache = torch.full((num_pages, k_NGD.shape[1], page_size, k_NGD.shape[2]), torch.nan, dtype=k_NGD.dtype)
    positions = torch.arange(k_NGD.shape[0])
    store_rows(cache, k_NGD, pages[positions // page_size] * page_size + positions % page_size)
    return cache


def test_attend_is_softmax_with_natural_lse() -> None:
    q, k, v = torch.randn(3, 8), torch.randn(11, 8), torch.randn(11, 8)
    out, lse = attend(q, k, v, SCALE)
    for row in range(3):
        want_out, want_lse = plain(q[row], k, v)
        torch.testing.assert_close(out[row].double(), want_out, rtol=1e-5, atol=1e-6)
        assert math.isclose(lse[row].item(), want_lse.item(), rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attend_accumulates_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(n, 16).to(dtype) for n in (2, 500, 500))
    out, lse = attend(q, k, v, SCALE)
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out[0].double(), plain(q[0], k, v)[0], rtol=1e-4, atol=1e-5)


def test_no_keys_give_zero_and_minus_infinity() -> None:
    q = torch.randn(2, 3, 4)
    for k, allowed in ((torch.randn(2, 0, 4), None), (torch.randn(2, 5, 4), torch.zeros(1, 1, 5, dtype=torch.bool))):
        out, lse = attend(q, k, k, SCALE, allowed)
        assert torch.equal(out, torch.zeros(2, 3, 4))
        assert torch.equal(lse, torch.full((2, 3), -torch.inf))


@settings(deadline=None, max_examples=40)
@given(
    keys=st.integers(0, 20), cut=st.integers(0, 20), seed=st.integers(0, 99), spread=st.sampled_from([0.1, 1.0, 30.0])
)
def test_merge_is_one_softmax_over_both_parts(keys: int, cut: int, seed: int, spread: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, 8, generator=draw) * s for n, s in ((3, spread), (keys, 1.0), (keys, 1.0)))
    cut = min(cut, keys)
    parts = [attend(q, k[part], v[part], SCALE) for part in (slice(None, cut), slice(cut, None))]
    out, lse = merge_states(*parts[0], *parts[1])
    want_out, want_lse = attend(q, k, v, SCALE)
    torch.testing.assert_close(out, want_out, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-5)
    assert torch.isfinite(out).all()


def test_merge_with_an_empty_part_changes_nothing() -> None:
    out, lse = attend(torch.randn(3, 8), torch.randn(5, 8), torch.randn(5, 8), SCALE)
    for merged in (
        merge_states(out, lse, torch.zeros_like(out), torch.full_like(lse, -torch.inf)),
        merge_states(torch.zeros_like(out), torch.full_like(lse, -torch.inf), out, lse),
    ):
        assert torch.equal(merged[0], out)
        torch.testing.assert_close(merged[1], lse)


def test_folding_keeps_heads_with_their_group() -> None:
    q = torch.randn(5, 6, 4)
    folded = fold_heads(q, 2)
    assert torch.equal(folded[1, 3 * 4 + 2], q[4, 3 + 2])  # group 1, row 4, third head of the group
    out, lse = unfold_heads(folded, folded[..., 0], 5)
    assert torch.equal(out, q) and torch.equal(lse, q[..., 0])


@pytest.mark.parametrize(("length", "page_size"), [(24, 8), (20, 8), (3, 8), (16, 4)])
def test_paged_prefix_equals_contiguous(length: int, page_size: int) -> None:
    q, k, v = torch.randn(4, 6, 8), torch.randn(length, 2, 8), torch.randn(length, 2, 8)
    pages = torch.randperm(9)
    caches = [paged(x, page_size, pages, 9) for x in (k, v)]
    out, lse = prefix_attention(q, *caches, pages, length, SCALE)
    for row, head in ((0, 0), (3, 5), (2, 3)):
        want_out, want_lse = plain(q[row, head], k[:, head // 3], v[:, head // 3])
        torch.testing.assert_close(out[row, head].double(), want_out, rtol=1e-5, atol=1e-6)
        assert math.isclose(lse[row, head].item(), want_lse.item(), rel_tol=1e-5)
    everything = torch.arange(length).expand(2, length)
    listed = listed_attention(q, *caches, pages, everything, torch.ones(2, length, dtype=torch.bool), SCALE)
    torch.testing.assert_close(listed[0], out)
    torch.testing.assert_close(listed[1], lse)


def test_lists_per_head_are_read_by_their_head_only() -> None:
    q, k, v = torch.randn(2, 4, 8), torch.randn(16, 2, 8), torch.randn(16, 2, 8)
    pages = torch.tensor([3, 1, 0, 2])
    caches = [paged(x, 4, pages, 5) for x in (k, v)]
    positions = torch.tensor([[0, 5, 0], [2, 3, 15], [7, 0, 0], [0, 0, 0]])
    listed = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    out, lse = listed_attention(q, *caches, pages, positions, listed, SCALE)
    for head in range(3):
        chosen = positions[head][listed[head]]
        want_out, _ = plain(q[1, head], k[chosen, head // 2], v[chosen, head // 2])
        torch.testing.assert_close(out[1, head].double(), want_out, rtol=1e-5, atol=1e-6)
    assert torch.equal(out[:, 3], torch.zeros(2, 8)) and bool((lse[:, 3] == -torch.inf).all())


def test_block_rows_see_their_own_block_in_both_directions() -> None:
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8)
    out, lse = block_attention(q, k, v, SCALE)
    want_out, want_lse = plain(q[1, 0, 5], k[1, :, 2], v[1, :, 2])
    torch.testing.assert_close(out[1, 0, 5].double(), want_out, rtol=1e-5, atol=1e-6)
    assert math.isclose(lse[1, 0, 5].item(), want_lse.item(), rel_tol=1e-5)


def test_block_causal_rows_see_up_to_the_end_of_their_block() -> None:
    q, k, v = torch.randn(8, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    pages = torch.tensor([2, 0, 1])
    caches = [paged(x, 8, pages, 3) for x in (k, v)]
    out = block_causal_attention(q, *caches, pages, 12, 4, SCALE)
    for row in range(8):
        end = (12 + row) // 4 * 4 + 4
        want, _ = plain(q[row, 3], k[:end, 1], v[:end, 1])
        torch.testing.assert_close(out[row, 3].double(), want, rtol=1e-5, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(keys=st.integers(2, 24), cut=st.integers(1, 23), seed=st.integers(0, 2**16), spread=st.floats(0.1, 3.0))
def test_removing_a_part_leaves_the_rest(keys: int, cut: int, seed: int, spread: float) -> None:
    cut = min(cut, keys - 1)
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, 8, generator=draw, dtype=torch.float32) for n in (3, keys, keys))
    q = q * spread
    whole, part, rest = (attend(q, k[:, s], v[:, s], 0.5) for s in (slice(None), slice(cut), slice(cut, None)))
    out, lse = remove_state(*whole, *part)
    lost = lse == -torch.inf
    share = torch.exp(rest[1] - whole[1])
    assert bool((share[lost] < 2 * REMAINDER).all()) and not out[lost].any()
    torch.testing.assert_close(lse[~lost], rest[1][~lost], rtol=1e-2, atol=1e-2)
    kept = ~lost & (share > 0.01)
    torch.testing.assert_close(out[kept], rest[0][kept], rtol=1e-3, atol=1e-3)


def test_removing_everything_or_nothing() -> None:
    q, k, v = (torch.randn(1, n, 4, generator=torch.Generator().manual_seed(n)) for n in (2, 5, 6))
    whole = attend(q, k, v[:, :5], 1.0)
    empty = (torch.zeros_like(whole[0]), torch.full_like(whole[1], -torch.inf))
    for part, want in ((whole, empty), (empty, whole)):
        for got, expected in zip(remove_state(*whole, *part), want, strict=True):
            torch.testing.assert_close(got, expected)
    assert bool((remove_state(*empty, *empty)[1] == -torch.inf).all())

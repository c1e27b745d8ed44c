"""Every backend against the reference, for every shape of question the seam can ask."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from losa_kernels.reference import attention as ref
from losa_kernels.reference.selection import page_scores
from losa_runtime.attention import torch_backend
from losa_runtime.attention.backend import AttentionBackend, BackendConfig
from losa_runtime.attention.questions import AttnState, KVIndices, PrefixPlan, RenewedStates, RowGroup, ScoreKind
from losa_runtime.attention.registry import backend_class, make_backend
from losa_runtime.attention.torch_backend import TorchBackend
from losa_runtime.cache.kv_pool import KVPool, Summary
from losa_runtime.core.batch import ForwardMode, Segment
from losa_runtime.core.errors import ConfigError
from tests.kernels.native import require_native
from tests.kernels.platforms import INTERPRETED

H, G, D, B, PAGE = 6, 2, 16, 4, 8
DEVICE = torch.device("cpu")  # tests/gpu runs these tests on another
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
KINDS = ("flash", "matmul", "native", *INTERPRETED)
SCALE = D**-0.5


Make = Callable[..., AttentionBackend]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Torch with the CPU's flash operation or with the plain one, native, or Triton in its interpreter."""
    found: str = request.param
    return found


@pytest.fixture
def make(kind: str, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes backends over pools of NaN."""
    if kind == "native":
        require_native()
    elif kind == "matmul":
        monkeypatch.setattr(torch_backend, "_flash", lambda q: False)
    cls = backend_class("torch" if kind in ("flash", "matmul") else kind)

    def build(dtype: torch.dtype = torch.float32, pages: int = 40, same_bits: bool = False) -> AttentionBackend:
        pool = KVPool(1, pages, G, PAGE, D, dtype, DEVICE, frozenset(Summary))
        for tensor in (pool.k(0), pool.v(0), *(pool.summary(0, kind) for kind in Summary)):
            tensor.fill_(torch.nan)
        return cls(pool, H, same_bits=same_bits)

    return build


@pytest.fixture
def half(kind: str) -> torch.dtype:
    """Numbers of 16 bits; those of bfloat16 are wrong in Triton's interpreter."""
    return torch.float16 if kind == "triton" and DEVICE.type == "cpu" else torch.bfloat16


def prefix(backend: AttentionBackend, q: Tensor, plan: PrefixPlan, group: RowGroup) -> AttnState:
    return backend.settle(backend.prefix(0, q, plan, group))


def store(backend: AttentionBackend, pages: Tensor, k: Tensor, v: Tensor, start: int = 0) -> None:
    at = torch.arange(start, start + k.shape[0])
    backend.store_kv(0, k, v, pages[at // PAGE] * PAGE + at % PAGE)


def block_segment(index: int, prefix_len: int, pages: Tensor) -> Segment:
    return Segment(ForwardMode.DENOISE, index * B, (index + 1) * B, prefix_len, pages, slot=index)


def three_requests(backend: AttentionBackend) -> RowGroup:
    """Prefixes of 20 (a partial page), 0 and 48 positions."""
    segments = []
    for index, length in enumerate((20, 0, 48)):
        pages = torch.randperm(12) + 12 * index
        if length:
            store(backend, pages, torch.randn(length, G, D), torch.randn(length, G, D))
        segments.append(block_segment(index, length, pages))
    return RowGroup.of(segments, B, DEVICE)


def reference_prefix(backend: AttentionBackend, group: RowGroup, index: int, q: Tensor) -> tuple[Tensor, Tensor]:
    segment = group.segments[index]
    caches = (backend.pool.k(0), backend.pool.v(0))
    return ref.prefix_attention(q, *caches, segment.pages, segment.prefix_len, SCALE)


def test_whole_prefixes_of_several_requests(make: Make) -> None:
    backend = make()
    group, q = three_requests(backend), torch.randn(3 * B, H, D)
    got = prefix(backend, q, PrefixPlan(), group)
    for index in (0, 2):
        rows = slice(index * B, (index + 1) * B)
        want = reference_prefix(backend, group, index, q[rows])
        torch.testing.assert_close((got.out_RHD[rows], got.lse_RH[rows]), want, **CLOSE)
    assert not got.out_RHD[B : 2 * B].any() and bool((got.lse_RH[B : 2 * B] == -torch.inf).all())


def test_planned_rows_only(make: Make) -> None:
    backend = make()
    group, q = three_requests(backend), torch.randn(3 * B, H, D)
    everything = prefix(backend, q, PrefixPlan(), group)
    rows = torch.tensor([1, 5, 8, 9, 11])
    some = prefix(backend, q, PrefixPlan(rows), group)
    torch.testing.assert_close(some, AttnState(*(x[rows] for x in everything)), **CLOSE)
    none = prefix(backend, q, PrefixPlan(torch.empty(0, dtype=torch.int64)), group)
    assert none.out_RHD.shape == (0, H, D) and none.lse_RH.shape == (0, H)


@pytest.mark.parametrize("heads", [G, H])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("granule", [PAGE, 1])
def test_lists_of_every_kind(make: Make, heads: int, per_row: bool, granule: int) -> None:
    backend = make()
    group, q = three_requests(backend), torch.randn(3 * B, H, D)
    rows = torch.tensor([0, 2, 3, 8, 10])
    owners = len(rows) if per_row else 3
    prefix_of = [20, 20, 20, 48, 48] if per_row else [20, 0, 48]
    chosen = torch.rand(owners, heads, -(-48 // granule)) < 0.5
    for owner, length in enumerate(prefix_of):
        chosen[owner, :, -(-length // granule) :] = False
    chosen[owners - 1, 1] = False  # one head reads nothing
    lists = KVIndices.from_mask(chosen, (False,) * 3)._replace(per_row=per_row)
    got = prefix(backend, q, PrefixPlan(rows, lists, granule), group)
    for place, row in enumerate(rows.tolist()):
        segment = group.segments[row // B]
        for head in range(H):
            mask = chosen[place if per_row else row // B, head * heads // H].repeat_interleave(granule)
            positions = mask.nonzero().flatten()
            positions = positions[positions < segment.prefix_len]
            flat = segment.pages[positions // PAGE], head * G // H, positions % PAGE
            k, v = backend.pool.k(0)[flat], backend.pool.v(0)[flat]
            out, lse = ref.attend(q[row, head][None], k, v, SCALE)
            torch.testing.assert_close(got.out_RHD[place, head], out[0], **CLOSE)
            torch.testing.assert_close(got.lse_RH[place, head], lse[0], **CLOSE)


def test_some_segments_whole_and_some_listed(make: Make) -> None:
    backend = make()
    group, q = three_requests(backend), torch.randn(3 * B, H, D)
    chosen = torch.zeros(3, G, 6, dtype=torch.bool)
    chosen[2, :, 5] = True
    got = prefix(backend, q, PrefixPlan(None, KVIndices.from_mask(chosen, (True, True, False)), PAGE), group)
    torch.testing.assert_close(got.out_RHD[:B], reference_prefix(backend, group, 0, q[:B])[0], **CLOSE)
    k, v = (cache[group.segments[2].pages[5]] for cache in (backend.pool.k(0), backend.pool.v(0)))
    out, _ = ref.attend(q[2 * B, 0][None], k[0], v[0], SCALE)
    torch.testing.assert_close(got.out_RHD[2 * B, 0], out[0], **CLOSE)


@pytest.mark.parametrize(("prefix_len", "count"), [(0, 20), (8, 4), (12, 280), (508, 8)])
def test_prefill_is_block_causal_over_pages(make: Make, prefix_len: int, count: int) -> None:
    backend = make(pages=90)
    pages, total = torch.randperm(90), prefix_len + count
    store(backend, pages, torch.randn(total, G, D), torch.randn(total, G, D))
    q = torch.randn(count, H, D)
    group = RowGroup.of([Segment(ForwardMode.PREFILL, 0, count, prefix_len, pages)], B, DEVICE)
    want = ref.block_causal_attention(q, backend.pool.k(0), backend.pool.v(0), pages, prefix_len, B, SCALE)
    torch.testing.assert_close(backend.prefill(0, q, group), want, **CLOSE)


def test_prefill_is_the_same_bits_when_cut_at_tiles(make: Make, kind: str) -> None:
    backend, length = make(pages=90), 64 if kind == "triton" else 2 * torch_backend.PREFILL_TILE
    pages, q = torch.randperm(90), torch.randn(length, H, D)
    store(backend, pages, torch.randn(length, G, D), torch.randn(length, G, D))

    def run(start: int, stop: int) -> Tensor:
        group = RowGroup.of([Segment(ForwardMode.PREFILL, 0, stop - start, start, pages)], B, DEVICE)
        return backend.prefill(0, q[start:stop], group)

    half = length // 2
    assert torch.equal(run(0, length), torch.cat((run(0, half), run(half, length))))


@pytest.mark.parametrize("cuts", [(B,), (3 * B, 4 * B), (9 * B, 10 * B, 17 * B)], ids=str)
def test_prefill_with_same_bits_may_be_cut_at_any_block(make: Make, cuts: tuple[int, ...]) -> None:
    backend, length = make(pages=90, same_bits=True), 20 * B
    pages, q = torch.randperm(90), torch.randn(length, H, D)
    store(backend, pages, torch.randn(length, G, D), torch.randn(length, G, D))

    def run(start: int, stop: int) -> Tensor:
        group = RowGroup.of([Segment(ForwardMode.PREFILL, 0, stop - start, start, pages)], B, DEVICE)
        return backend.prefill(0, q[start:stop], group)

    pieces = [run(start, stop) for start, stop in pairwise((0, *cuts, length))]
    assert torch.equal(run(0, length), torch.cat(pieces))


def test_block_attention_of_each_block(make: Make) -> None:
    backend = make()
    group = RowGroup.of([block_segment(index, 0, torch.arange(1)) for index in range(3)], B, DEVICE)
    q, k, v = torch.randn(3 * B, H, D), torch.randn(3 * B, G, D), torch.randn(3 * B, G, D)
    got = backend.block(q, k, v, group)
    out, lse = ref.block_attention(q.view(3, B, H, D), k.view(3, B, G, D), v.view(3, B, G, D), SCALE)
    torch.testing.assert_close(got, AttnState(out.flatten(0, 1), lse.flatten(0, 1)), **CLOSE)
    alone = RowGroup.of([block_segment(0, 0, torch.arange(1))], B, DEVICE)
    assert torch.equal(backend.block(q[B : 2 * B], k[B : 2 * B], v[B : 2 * B], alone).out_RHD, got.out_RHD[B : 2 * B])


def test_prefix_and_block_merge_to_one_softmax(make: Make) -> None:
    backend = make()
    pages, k, v = torch.tensor([7, 3, 9]), torch.randn(24, G, D), torch.randn(24, G, D)
    store(backend, pages, k[:20], v[:20])
    q = torch.randn(B, H, D)
    group = RowGroup.of([block_segment(0, 20, pages)], B, DEVICE)
    merged = backend.merge(prefix(backend, q, PrefixPlan(), group), backend.block(q, k[20:], v[20:], group))
    whole, _ = ref.attend(ref.fold_heads(q, G), k.transpose(0, 1), v.transpose(0, 1), SCALE)
    torch.testing.assert_close(ref.fold_heads(merged, G), whole, **CLOSE)


PLANNED = {"all": None, "none": [], "some": [0, 3, 4, 6, 11], "every": list(range(3 * B))}


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("planned", PLANNED)
def test_fresh_states_are_merged_and_remembered_the_others_recalled(make: Make, planned: str, by_head: bool) -> None:
    """Three blocks, whose states lie scattered in a memory of five; places that are not theirs stay as they are."""
    backend, listed = make(), PLANNED[planned]
    group = RowGroup.of([block_segment(index, 0, torch.arange(1)) for index in range(3)], B, DEVICE)
    q, k, v = torch.randn(3 * B, H, D), torch.randn(3 * B, G, D), torch.randn(3 * B, G, D)
    kept = AttnState(torch.randn(5 * B, H, D), torch.randn(5 * B, H))
    place_R = (torch.tensor([4, 0, 2])[:, None] * B + torch.arange(B)).flatten()
    rows = None if listed is None else torch.tensor(listed, dtype=torch.int64)
    count = 3 * B if rows is None else len(rows)
    fresh = AttnState(torch.randn(count, H, D), torch.randn(count, H))
    for out, lse in (kept, fresh):
        out[::3], lse[::3] = 0.0, -torch.inf  # a row without keys
    heads_nH = torch.rand(count, H) < 0.5 if by_head else None
    want = AttnState(*(x.clone() for x in kept))
    for index, row in enumerate(range(3 * B) if listed is None else listed):
        for head in range(H):
            if heads_nH is None or heads_nH[index, head]:
                for memory, new in zip(want, fresh, strict=True):
                    memory[place_R[row], head] = new[index, head]
    settled = AttnState(*(x[place_R] for x in want))
    by_settling, by_merging = (
        RenewedStates(AttnState(*(x.clone() for x in kept)), place_R, rows, fresh, heads_nH) for _ in range(2)
    )
    got = backend.settle(by_settling)
    merged = backend.block_merged(by_merging, q, k, v, group)
    assert all(torch.equal(a, b) for a, b in zip(got, settled, strict=True))
    assert torch.equal(merged, backend.block_merged(settled, q, k, v, group))
    for remembered in (by_settling.kept, by_merging.kept):
        assert all(torch.equal(a, b) for a, b in zip(remembered, want, strict=True))


def test_scores_of_some_rows_with_padding(make: Make) -> None:
    backend = make()
    group, q = three_requests(backend), torch.randn(3 * B, H, D)
    rows = torch.tensor([1, 3, 8])
    scores = backend.kv_scores(0, q, rows, ScoreKind.BOUND, PAGE, group)
    assert scores.shape == (3, H, 6)
    bounds = backend.pool.summary(0, Summary.KEY_BOUNDS)
    want = page_scores(q[[1, 3]], bounds[group.segments[0].pages[:3]])
    torch.testing.assert_close(scores[:2, :, :3], want, **CLOSE)
    assert bool((scores[:2, :, 3:] == -torch.inf).all()) and bool(scores[2].isfinite().all())


def bounds_of(backend: AttentionBackend, page: int) -> tuple[Tensor, Tensor]:
    both = backend.pool.summary(0, Summary.KEY_BOUNDS)[page]
    return both[:, 0], both[:, 1]


def check_moments(backend: AttentionBackend, page: int, keys: Tensor) -> None:
    """The page's mean and variance are those of these keys."""
    want = torch.stack((keys.float().mean(0), keys.float().var(0, correction=0)), 1)
    torch.testing.assert_close(backend.pool.summary(0, Summary.KEY_MOMENTS)[page], want, **CLOSE)


@pytest.mark.parametrize("rounded", [False, True])
def test_summary_of_a_page_filled_by_two_blocks(make: Make, half: torch.dtype, rounded: bool) -> None:
    dtype = half if rounded else torch.float32
    backend, pages = make(dtype), torch.tensor([5])
    k = torch.randn(8, G, D)
    kept = k.to(dtype)
    store(backend, pages, k[:4], k[:4])
    assert torch.equal(bounds_of(backend, 5)[0], kept[:4].amax(0))
    check_moments(backend, 5, kept[:4])
    store(backend, pages, k[4:], k[4:], start=4)
    check_moments(backend, 5, kept)
    assert torch.equal(bounds_of(backend, 5)[0], kept.amax(0))
    assert torch.equal(bounds_of(backend, 5)[1], kept.amin(0))


def test_reused_page_shows_nothing_of_its_earlier_owner(make: Make) -> None:
    backend, pages = make(), torch.tensor([5])
    store(backend, pages, torch.full((8, G, D), 50.0), torch.full((8, G, D), 50.0))
    k, v, q = torch.randn(4, G, D), torch.randn(4, G, D), torch.randn(B, H, D)
    store(backend, pages, k, v)
    assert torch.equal(bounds_of(backend, 5)[0], k.amax(0)) and torch.equal(bounds_of(backend, 5)[1], k.amin(0))
    check_moments(backend, 5, k)
    group = RowGroup.of([block_segment(0, 4, pages)], B, DEVICE)
    listed = KVIndices.from_mask(torch.ones(1, G, 1, dtype=torch.bool), (False,))
    want, _ = ref.attend(ref.fold_heads(q, G), k.transpose(0, 1), v.transpose(0, 1), SCALE)
    for plan in (PrefixPlan(), PrefixPlan(None, listed, PAGE)):
        got = prefix(backend, q, plan, group).out_RHD
        torch.testing.assert_close(ref.fold_heads(got, G), want, **CLOSE)


def test_pages_of_16_bits_are_read_as_they_were_rounded(make: Make, half: torch.dtype) -> None:
    exact, rounded = make(), make(half)
    pages, k, v = torch.tensor([1, 0, 2]), torch.randn(20, G, D), torch.randn(20, G, D)
    store(rounded, pages, k, v)
    store(exact, pages, k.to(half).float(), v.to(half).float())
    q, group = torch.randn(B, H, D), RowGroup.of([block_segment(0, 20, pages)], B, DEVICE)
    both = [prefix(backend, q, PrefixPlan(), group) for backend in (exact, rounded)]
    assert both[1].out_RHD.dtype == torch.float32
    assert torch.equal(both[0].out_RHD, both[1].out_RHD) and torch.equal(both[0].lse_RH, both[1].lse_RH)


def test_group_of_scattered_segments_takes_and_puts_its_rows() -> None:
    x = torch.arange(12.0)
    group = RowGroup.of([block_segment(0, 0, torch.arange(1)), block_segment(2, 0, torch.arange(1))], B, DEVICE)
    assert group.take(x).tolist() == [0, 1, 2, 3, 8, 9, 10, 11] and group.starts == (0, 4)
    group.put(x, torch.zeros(8))
    assert x.tolist() == [0, 0, 0, 0, 4, 5, 6, 7, 0, 0, 0, 0]


def test_refusals_name_the_reason() -> None:
    config = BackendConfig(DEVICE, torch.float32, torch.float32, H, G, D, page_size=12, block_length=8)
    pool = KVPool(1, 1, G, 12, D, torch.float32)
    with pytest.raises(ConfigError, match="page size 12 and block length 8"):
        make_backend("torch", config, pool)
    with pytest.raises(ConfigError, match="found 'fast', allowed: native, triton, flashinfer, torch"):
        make_backend("fast", config._replace(page_size=8), pool)
    assert TorchBackend.supports(config._replace(page_size=16)) is None


@pytest.mark.parametrize("granule", [PAGE, 3, 64])
@pytest.mark.parametrize("over", ["mean", "max"])
def test_mass_of_granules(make: Make, granule: int, over: Literal["mean", "max"]) -> None:
    """Against a softmax of the gathered keys; a request without a prefix has none."""
    backend = make()
    group, q = three_requests(backend), torch.randn(3 * B, H, D)
    lse = prefix(backend, q, PrefixPlan(), group).lse_RH
    got = backend.prefix_mass(0, q, lse, granule, group, over)
    assert got.shape == (3, H, -(-48 // granule)) and not got[1].any()
    for index in (0, 2):
        keys = backend.prefix_keys(0, group.segments[index]).repeat_interleave(H // G, dim=0)
        logits = torch.einsum("rhd,hnd->rhn", q[index * B : (index + 1) * B], keys) * SCALE
        weights = logits.softmax(-1).split(granule, dim=-1)
        parts = torch.stack([part.sum(-1) for part in weights], dim=-1)
        want = parts.mean(0) if over == "mean" else parts.amax(0)
        torch.testing.assert_close(got[index, :, : want.shape[1]], want, **CLOSE)
        assert not got[index, :, want.shape[1] :].any()
    if over == "mean":
        torch.testing.assert_close(got[[0, 2]].sum(-1), torch.ones(2, H), **CLOSE)

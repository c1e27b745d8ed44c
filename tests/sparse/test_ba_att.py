"""BA-Att's own ideas: keys of similar norm make a block, and a block is known by its mean and its variance."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from losa_kernels.reference import paging
from losa_runtime.cache.kv_pool import Summary
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.key_blocks import block_logits, cut_keys, join_pages, share_logits
from losa_runtime.sparse.resolve import resolve
from tests.sparse.oracle import block_outputs
from tests.sparse.spy import lists, watch
from tests.sparse.stage import Result, Sizes, Stage, denoise_item, params, random_rows

PROMPT = 96
Lists = list[list[int]]


def keys(length: int, heads: int = 2, dim: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(heads, length, dim, generator=torch.Generator().manual_seed(seed))


def run(
    sizes: Sizes,
    steps: int = 3,
    budget: int = 16,
    layer: int = 0,
    prompt: int = PROMPT,
    stage: Stage | None = None,
    **options: Any,
) -> tuple[list[Result], list[Lists | None]]:
    """The results of a block, and the lists of one layer (None: everything was read)."""
    stage = stage or Stage(sizes)
    stage.prefill("r", prompt)
    plans = watch(stage, layer)
    results = stage.denoise("r", prompt, params("ba_att", budget, **options), steps)
    return results, [None if plan.kv is None else lists(plan) for plan in plans]


def metadata_vectors(results: list[Result], sizes: Sizes) -> list[int]:
    """Vectors per KV head that each step read to choose, all layers together."""
    size = sizes.kv_heads * sizes.dim * 4
    return [result.report.metadata_bytes // size for result in results if result.report is not None]


@pytest.mark.parametrize(("length", "size"), [(40, 8), (41, 8), (47, 8), (5, 8), (9, 1)])
def test_every_key_is_in_one_block_and_blocks_follow_the_norm(length: int, size: int) -> None:
    some = keys(length)
    blocks = cut_keys(some, size, by_norm=True)
    assert blocks.order_Gnc is not None
    for g in range(2):
        order = blocks.order_Gnc[g].flatten()
        real, padding = order[:length], order[length:]
        assert sorted(real.tolist()) == list(range(length)) and padding.tolist() == [length] * (-length % size)
        assert torch.equal(real, some[g].norm(dim=-1).argsort())


@pytest.mark.parametrize("length", [40, 43])
@pytest.mark.parametrize("by_norm", [True, False])
def test_blocks_know_the_mean_and_variance_of_their_keys(length: int, by_norm: bool) -> None:
    some = keys(length)
    blocks, bare = (cut_keys(some, 8, by_norm, spread) for spread in (True, False))
    assert blocks.variance_GnD is not None and bare.variance_GnD is None and torch.equal(bare.mean_GnD, blocks.mean_GnD)
    assert (blocks.order_Gnc is None) == (bare.order_Gnc is None) == (not by_norm)
    for g in range(2):
        order = torch.arange(length) if blocks.order_Gnc is None else blocks.order_Gnc[g].flatten()[:length]
        for i, block in enumerate(order.split(8)):
            mine = some[g, block]
            torch.testing.assert_close(blocks.mean_GnD[g, i], mine.mean(0))
            torch.testing.assert_close(blocks.variance_GnD[g, i], mine.var(0, correction=0))


@given(
    page=st.sampled_from([1, 4, 16]),
    per=st.integers(1, 5),
    length=st.integers(1, 150),
    far=st.sampled_from([0.0, 50.0]),
)
def test_pages_joined_are_the_blocks_cut_of_their_keys(page: int, per: int, length: int, far: float) -> None:
    """With short last pages and short last blocks, and keys that are far from zero and close together."""
    some = keys(length, seed=length) + far
    pages = -(-length // page)
    held = torch.full((2, pages * page, 8), torch.nan)  # behind the last key nothing was ever written
    held[:, :length] = some
    filled = torch.full((pages,), page)
    filled[-1] = length - (pages - 1) * page
    moments = paging.key_moments(held.unflatten(1, (-1, page)).transpose(0, 1), filled)
    want, got = cut_keys(some, per * page, by_norm=False), join_pages(moments, page, length, per * page)
    assert got.order_Gnc is None and want.order_Gnc is None
    torch.testing.assert_close(got.mean_GnD, want.mean_GnD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.variance_GnD, want.variance_GnD, rtol=1e-4, atol=1e-6)
    bare = join_pages(moments[:, :, :1], page, length, per * page)
    assert bare.variance_GnD is None and torch.equal(bare.mean_GnD, got.mean_GnD)


def test_equal_norms_stay_in_order() -> None:
    some = torch.ones(1, 7, 4) * torch.tensor([2.0, 1, 2, 1, 1, 2, 2])[:, None]
    order = cut_keys(some, 7, by_norm=True).order_Gnc
    assert order is not None and order.flatten().tolist() == [1, 3, 4, 0, 2, 5, 6]


def test_positions_of_chosen_blocks_are_sorted_and_end_with_the_prefix() -> None:
    blocks = cut_keys(torch.arange(1.0, 11).flip(0)[None, :, None], 4, by_norm=True)  # 9 8 7 6, 5 4 3 2, 1 0
    positions, real = blocks.positions(torch.tensor([[True, False, True]]), 10)
    assert positions[real].tolist() == [0, 1, 6, 7, 8, 9] and not real[0, 6:].any()


def test_the_variance_term_is_the_variance_of_the_logits_for_independent_channels() -> None:
    """Rows and keys that are all combinations of a few values per channel have independent channels."""
    grid = torch.cartesian_prod(*(torch.tensor(values) for values in ([-1.0, 2.0], [0.5, 3.0], [1.0, 1.5])))
    q, k = grid[:, None], (grid.flip(1) * torch.tensor([1.0, -2.0, 0.5]))[None]
    logits = q[:, 0] @ k[0].T * 0.5
    blocks = cut_keys(k, len(grid), by_norm=True)
    mean = block_logits(q, blocks, 0.5, 0.0)
    torch.testing.assert_close(mean.flatten(), logits.mean()[None])
    varied = block_logits(q, blocks, 0.5, 1.0)
    torch.testing.assert_close((varied - mean).flatten(), logits.flatten().var(correction=0)[None])
    torch.testing.assert_close(block_logits(q, blocks, 0.5, 0.25), mean + (varied - mean) / 4)


def test_a_group_shares_the_mean_of_its_probabilities() -> None:
    logits = torch.tensor([[[0.0, 3.0, 1.0], [2.0, 0.0, 2.5]], [[0.0, 900.0, 0.0], [0.0, 0.0, -900.0]]])
    torch.testing.assert_close(share_logits(logits).exp() / 2, torch.softmax(logits, -1).mean(1))
    assert share_logits(torch.tensor([[[0.0, -300.0, -200.0]]])).argsort().tolist() == [[1, 2, 0]]  # nothing vanishes


def wide_and_narrow(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys 0 to 31 all point a little towards the queries; 32 to 63 are larger, and are strongly for or against them.

    Behind them keys as large as these, but with no product at all.
    """
    q, k, v = random_rows(s, name, block, step, layer)
    at = torch.arange(s.block) + block * s.block
    k = torch.zeros_like(k)
    k[..., 0] = torch.where(at < 32, 1.0, torch.where(at < 64, 8.0 * (-1.0) ** at, 0.0))[:, None]
    k[..., 1] = torch.where(at < 64, 0.0, 8.0 + 0.01 * at)[:, None]
    return torch.eye(s.dim)[0].expand_as(q).clone(), k, v


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, range(32, 64)),
        ({"variance_layers": "all"}, range(32, 64)),
        ({"variance_layers": "none"}, range(32)),
        ({"beta": 0.0}, range(32)),
        ({"beta": 0.001}, range(32)),
    ],
)
def test_the_variance_term_can_change_the_choice(options: dict[str, Any], expected: range) -> None:
    stage = Stage(rows=wide_and_narrow)
    stage.prefill("r", PROMPT)
    plans = watch(stage)
    stage.denoise("r", PROMPT, params("ba_att", 32, block_size=32, **options), 2)
    assert all(lists(plan) == [list(expected)] * stage.sizes.kv_heads for plan in plans)


@pytest.mark.parametrize(("where", "layers"), [("ends", [0, 2]), ("all", [0, 1, 2]), ("none", [])])
def test_layers_with_the_variance_term(where: str, layers: list[int]) -> None:
    sizes = Sizes(layers=3)
    _, plain = run(sizes, block_size=8, variance_layers="none")
    for layer in range(3):
        _, varied = run(sizes, block_size=8, variance_layers=where, beta=50.0, layer=layer)
        _, plain = run(sizes, block_size=8, variance_layers="none", layer=layer)
        assert (varied != plain) == (layer in layers)
    results, _ = run(sizes, block_size=8, variance_layers=where)
    blocks = PROMPT // 8
    assert metadata_vectors(results, sizes) == [3 * PROMPT, *[blocks * (3 + len(layers))] * 2]


def test_one_block_is_everything() -> None:
    for size in (PROMPT, 128):
        results, seen = run(Sizes(), budget=8, block_size=size)
        assert seen == [None] * 3 and metadata_vectors(results, Sizes()) == [0, 0, 0]
        assert all(r.report is not None and r.report.bypassed and r.report.dense for r in results)


@pytest.mark.parametrize(("budget", "size", "count"), [(16, 8, 2), (16, 5, 4), (8, 32, 1), (40, 32, 2)])
def test_a_budget_is_rounded_up_to_whole_key_blocks(budget: int, size: int, count: int) -> None:
    _, seen = run(Sizes(), budget=budget, block_size=size, sort=False)
    assert all(chosen is not None and {len(set(each)) for each in chosen} == {count} for chosen in seen)


@pytest.mark.parametrize("size", [16, 32, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variance_layers", ["ends", "none"])
def test_page_moments_give_the_answers_of_the_keys(
    sizes: Sizes, size: int, dtype: torch.dtype, variance_layers: str
) -> None:
    """The same key blocks are chosen, with numbers that are the same to rounding, and no key is read to choose them."""
    sizes, prompt, found = sizes._replace(layers=3), PROMPT + sizes.block, []
    options = {"block_size": size, "sort": False, "variance_layers": variance_layers}
    for kept in (frozenset(Summary), frozenset({Summary.KEY_BOUNDS})):
        stage = Stage(sizes, dtype, summaries=kept)
        found.append(run(sizes, 3, 32, layer=1, prompt=prompt, stage=stage, **options))
        if kept == frozenset(Summary):
            stage.backend.prefix_keys = None  # type: ignore[method-assign, assignment]
            stage.denoise("r", prompt, params("ba_att", 32, **options), 1)
    (with_moments, chosen), (without, also_chosen) = found
    assert chosen == also_chosen and chosen[0] is not None
    for mine, other in zip(with_moments, without, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.layers, other.layers, strict=True))
        assert mine.report is not None and other.report is not None
        assert mine.report._replace(metadata_bytes=0)[1:] == other.report._replace(metadata_bytes=0)[1:]
    spread, blocks, wide = 2 * (variance_layers == "ends"), -(-prompt // size), 4 // dtype.itemsize
    later, scale = [wide * blocks * (3 + spread)] * 2, dtype.itemsize / 4
    bytes_read = [
        [vectors * scale for vectors in counted]
        for counted in ([wide * -(-prompt // sizes.page) * (3 + spread), *later], [3 * prompt, *later])
    ]
    assert [metadata_vectors(with_moments, sizes), metadata_vectors(without, sizes)] == bytes_read


@pytest.mark.parametrize(("size", "sort"), [(8, False), (24, False), (16, True)])
def test_keys_are_read_where_moments_are_of_no_use(size: int, sort: bool) -> None:
    """Blocks that are not whole pages, and blocks by norm."""
    sizes = Sizes(block=4, page=16)
    results, _ = run(sizes, block_size=size, sort=sort)
    assert metadata_vectors(results, sizes)[0] == 2 * PROMPT


def test_blocks_committed_one_by_one_are_seen_by_the_next(sizes: Sizes) -> None:
    """Moments of the last page grow with it: after every commit the choice is that of keys."""
    sparse, seen = params("ba_att", 16, block_size=16, sort=False, variance_layers="all"), []
    for kept in (frozenset(Summary), frozenset({Summary.KEY_BOUNDS})):
        stage, outs = Stage(sizes, summaries=kept), []
        plans = watch(stage)
        stage.prefill("r", 48)
        for start in range(48, 48 + 6 * sizes.block, sizes.block):
            outs.append(stage.denoise("r", start, sparse, 2))
            stage.prefill("r", start + sizes.block, start)
        seen.append(([lists(plan) for plan in plans], outs))
    assert seen[0][0] == seen[1][0]
    assert all(
        torch.equal(x, y)
        for one, other in zip(*(outs for _, outs in seen), strict=True)
        for a, b in zip(one, other, strict=True)
        for x, y in zip(a.layers, b.layers, strict=True)
    )


def test_every_step_chooses_anew_among_the_same_blocks(sizes: Sizes) -> None:
    stage = Stage(sizes)
    stage.prefill("r", PROMPT)
    plans = watch(stage)
    results = stage.denoise("r", PROMPT, params("ba_att", 32, block_size=4), 6)
    chosen = [lists(plan) for plan in plans]
    assert any(a != b for a, b in pairwise(chosen))
    assert metadata_vectors(results, sizes) == [2 * PROMPT] + [2 * 2 * PROMPT // 4] * 5
    held = stage.methods["ba_att"]._blocks[0, 0].order_Gnc  # type: ignore[attr-defined]
    for each in chosen:
        for g, positions in enumerate(each):
            mine = {tuple(sorted(block)) for block in held[g].tolist()}
            assert sum(set(block) <= set(positions) for block in mine) == 8 and len(positions) == 32


def test_a_dense_first_step_is_dense_and_changes_nothing_else(sizes: Sizes) -> None:
    dense, seen = run(sizes, block_size=8, first_step="dense")
    sparse, _ = run(sizes, block_size=8)
    assert seen[0] is None and dense[0].report is not None and dense[0].report.dense
    for mine, other in zip(dense[1:], sparse[1:], strict=True):
        assert mine.report is not None and other.report is not None and mine.report[1:] == other.report[1:]
        assert all(torch.equal(a, b) for a, b in zip(mine.layers, other.layers, strict=True))
    assert metadata_vectors(dense, sizes) == metadata_vectors(sparse, sizes)


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        (16, {"block_size": 7}),
        (16, {"block_size": 1}),
        (24, {"block_size": 16, "sort": False}),
        (32, {"block_size": 32, "sort": False, "variance_layers": "all"}),
        (12, {"block_size": 12, "sort": False}),
        (16, {"block_size": 8, "beta": 20.0, "variance_layers": "all"}),
        (16, {"block_size": 8, "variance_layers": "none"}),
        (16, {"block_size": 8, "first_step": "dense", "beta": 0.5}),
    ],
)
@pytest.mark.parametrize("layers", [1, 3])
def test_results_with_other_options_are_those_of_the_paper(
    sizes: Sizes, budget: int, options: dict[str, Any], layers: int
) -> None:
    stage, sparse = Stage(sizes._replace(layers=layers)), params("ba_att", budget, **options)
    stage.prefill("r", 64)
    want = block_outputs(stage, "r", 64, sparse, 3)
    for got, expected in zip(stage.denoise("r", 64, sparse, 3), want, strict=True):
        for mine, oracle in zip(got.layers, expected, strict=True):
            torch.testing.assert_close(mine.double(), oracle, rtol=1e-4, atol=2e-6)


def test_sums_in_half_the_bits_are_counted_as_what_they_are() -> None:
    """Means and variances are float32, twice as wide as the keys."""
    stage = Stage(dtype=torch.bfloat16)
    stage.prefill("r", PROMPT)
    results = stage.denoise("r", PROMPT, params("ba_att", 16, block_size=8), 2)
    vectors = [r.report.metadata_bytes / (stage.sizes.kv_heads * stage.sizes.dim * 2) for r in results if r.report]
    assert vectors == [2 * PROMPT, 2 * 2 * 2 * PROMPT // 8]


def test_release_forgets_the_blocks() -> None:
    stage = Stage()
    stage.prefill("r", PROMPT)
    stage.denoise("r", PROMPT, params("ba_att", 16, block_size=8), 1)
    method = stage.methods["ba_att"]
    method.release(0)
    assert not method._blocks and not method._lists._lists  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("option", "found"),
    [("variance_layers", "first"), ("first_step", "whole"), ("block_size", 0), ("beta", -1.0), ("sort", 1)],
)
def test_options_out_of_range_are_refused(option: str, found: Any) -> None:
    wanted = DiffusionParams(sparse_method="ba_att", sparse_options={option: found})
    with pytest.raises(InvalidRequest, match=rf"custom_params.sparse_options.{option}: found {found!r}"):
        resolve(wanted, EngineConfig.parse(model="m"), Stage().geometry)


def test_neighbours_in_other_phases_are_not_felt(sizes: Sizes) -> None:
    """In one forward: first steps beside later ones, other lengths, and a prefix that is read whole."""
    company = {"a": (PROMPT, 16, 0), "b": (64, 24, 1), "c": (80, 16, 2), "d": (16, 16, 0), "e": (0, 16, 1)}
    for first_step in ("sparse", "dense"):
        stage = Stage(sizes)
        sparse = {n: params("ba_att", b, block_size=8, first_step=first_step) for n, (_, b, _) in company.items()}
        for slot, (name, (prompt, _, ahead)) in enumerate(company.items()):
            stage.prefill(name, prompt)
            stage.denoise(name, prompt, sparse[name], ahead, slot)
        together = [
            stage.forward(
                *(
                    denoise_item(name, prompt, sparse[name], step + ahead, slot, sizes)
                    for slot, (name, (prompt, _, ahead)) in enumerate(company.items())
                )
            )
            for step in range(3)
        ]
        for place, (name, (prompt, _, ahead)) in enumerate(company.items()):
            alone = Stage(sizes, seed=3)
            alone.prefill(name, prompt)
            results = alone.denoise(name, prompt, sparse[name], 3 + ahead)[ahead:]
            for mine, other in zip([step[place] for step in together], results, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(mine.layers, other.layers, strict=True))
                assert mine.report is not None and other.report is not None and mine.report[1:] == other.report[1:]

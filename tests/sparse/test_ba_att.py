"""BA-Att's own ideas: keys of similar norm make a block, and a block is known by its mean and its variance."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.key_blocks import block_logits, cut_keys, share_logits
from losa_runtime.sparse.resolve import resolve
from tests.sparse.oracle import block_outputs
from tests.sparse.spy import lists, watch
from tests.sparse.stage import Result, Sizes, Stage, denoise_item, params, random_rows

PROMPT = 96
Lists = list[list[int]]


def keys(length: int, heads: int = 2, dim: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(heads, length, dim, generator=torch.Generator().manual_seed(seed))


def run(
    sizes: Sizes, steps: int = 3, budget: int = 16, layer: int = 0, **options: Any
) -> tuple[list[Result], list[Lists | None]]:
    """The results of a block, and the lists of one layer (None: everything was read)."""
    stage = Stage(sizes)
    stage.prefill("r", PROMPT)
    plans = watch(stage, layer)
    results = stage.denoise("r", PROMPT, params("ba_att", budget, **options), steps)
    return results, [None if plan.kv is None else lists(plan) for plan in plans]


def metadata_vectors(results: list[Result], sizes: Sizes) -> list[int]:
    """Vectors per KV head that each step read to choose, all layers together."""
    size = sizes.kv_heads * sizes.dim * 4
    return [result.report.metadata_bytes // size for result in results if result.report is not None]


@pytest.mark.parametrize(("length", "size"), [(40, 8), (41, 8), (47, 8), (5, 8), (9, 1)])
@pytest.mark.parametrize("by_norm", [True, False])
def test_every_key_is_in_one_block_and_blocks_follow_the_norm(length: int, size: int, by_norm: bool) -> None:
    some = keys(length)
    blocks = cut_keys(some, size, by_norm)
    for g in range(2):
        order = blocks.order_Gnc[g].flatten()
        real, padding = order[:length], order[length:]
        assert sorted(real.tolist()) == list(range(length)) and padding.tolist() == [length] * (-length % size)
        norms = some[g].norm(dim=-1)
        assert torch.equal(real, norms.argsort()) if by_norm else real.tolist() == list(range(length))


@pytest.mark.parametrize("length", [40, 43])
def test_blocks_know_the_mean_and_variance_of_their_keys(length: int) -> None:
    some = keys(length)
    blocks = cut_keys(some, 8, by_norm=True)
    for g in range(2):
        for block, mean, variance in zip(blocks.order_Gnc[g], blocks.mean_GnD[g], blocks.variance_GnD[g], strict=True):
            mine = some[g, block[block < length]]
            torch.testing.assert_close(mean, mine.mean(0))
            torch.testing.assert_close(variance, mine.var(0, correction=0))


def test_equal_norms_stay_in_order() -> None:
    some = torch.ones(1, 7, 4) * torch.tensor([2.0, 1, 2, 1, 1, 2, 2])[:, None]
    assert cut_keys(some, 7, by_norm=True).order_Gnc.flatten().tolist() == [1, 3, 4, 0, 2, 5, 6]


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
    for chosen in seen:
        assert chosen is not None
        for each in chosen:
            assert len({at // size for at in each}) == count
            assert set(each) == {at for at in range(PROMPT) if at // size in {p // size for p in each}}


def test_every_step_chooses_anew_among_the_same_blocks(sizes: Sizes) -> None:
    stage = Stage(sizes)
    stage.prefill("r", PROMPT)
    plans = watch(stage)
    results = stage.denoise("r", PROMPT, params("ba_att", 32, block_size=4), 6)
    chosen = [lists(plan) for plan in plans]
    assert any(a != b for a, b in pairwise(chosen))
    assert metadata_vectors(results, sizes) == [2 * PROMPT] + [2 * 2 * PROMPT // 4] * 5
    held = stage.methods["ba_att"]._blocks[0, 0]  # type: ignore[attr-defined]
    for each in chosen:
        for g, positions in enumerate(each):
            mine = {tuple(sorted(block)) for block in held.order_Gnc[g].tolist()}
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

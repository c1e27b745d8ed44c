"""MAGE's own ideas: one exact first step fixes the keys of a block; layers may share one budget."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from losa_runtime.attention.questions import AttnState, PrefixPlan, RowGroup
from losa_runtime.core.batch import SparseParams
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.layer_budgets import LayerVotes, cut, share_budget, vote
from losa_runtime.sparse.resolve import resolve
from tests.sparse.oracles.mage import adaptive_sets, held
from tests.sparse.oracles.mass import average, masses
from tests.sparse.oracles.maths import Scene
from tests.sparse.stage import Result, Sizes, Stage, denoise_item, params, random_rows

PROMPT, BUDGET = 96, 16
Lists = list[list[int]]


def still(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same rows in every step."""
    return random_rows(s, name, block, 0, layer)


def focused(s: Sizes, name: str, block: int, step: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """All rows and heads of layer 0 ask nearly the same; those of the other layers differ."""
    q, k, v = random_rows(s, name, block, step, layer)
    return (q if layer else 0.02 * q + 2 * q[:1, :1]), k, v


def run(
    stage: Stage, sparse: SparseParams, steps: int = 4, start: int = PROMPT
) -> tuple[list[Result], list[list[Lists | None]]]:
    """The results of a block, and the lists per step, layer and KV head (None: everything was read)."""
    seen: list[Lists | None] = []
    ask = stage.backend.prefix

    def spy(layer: int, q: Tensor, plan: PrefixPlan, group: RowGroup) -> AttnState:
        if plan.kv is not None:
            assert plan.rows is None and plan.granule == 1 and plan.kv.heads == stage.sizes.kv_heads
            seen.append([plan.kv.indices[a:b].tolist() for a, b in pairwise(plan.kv.indptr.tolist())])
        else:
            seen.append(None)
        return ask(layer, q, plan, group)

    stage.prefill("r", start)
    stage.backend.prefix = spy  # type: ignore[method-assign]
    results = stage.denoise("r", start, sparse, steps)
    stage.backend.prefix = ask  # type: ignore[method-assign]
    layers = stage.sizes.layers
    return results, [seen[at : at + layers] for at in range(0, len(seen), layers)]


def scenes(stage: Stage, sparse: SparseParams, step: int = 0, start: int = PROMPT) -> list[Scene]:
    """What the oracle sees of one step, per layer."""
    s, found = stage.sizes, []
    for layer in range(s.layers):
        past = [stage.rows(s, "r", block, 0, layer) for block in range(start // s.block)]
        keys, values = (torch.cat([p[i] for p in past]).double() for i in (1, 2))
        q = stage.rows(s, "r", start // s.block, step, layer)[0].double()
        found.append(Scene(q, keys, values, s.page, step, sparse, {}))
    return found


def test_unmoved_queries_find_the_best_keys_in_every_step(sizes: Sizes) -> None:
    stage, sparse = Stage(sizes, rows=still), params("mage", BUDGET)
    _, lists = run(stage, sparse)
    for step in (1, 2, 3):
        for scene, layer in zip(scenes(stage, sparse, step), lists[step], strict=True):
            assert layer == [held(scene, g) for g in range(sizes.kv_heads)]


def test_the_set_stays_while_queries_move_and_rows_are_computed_anew(sizes: Sizes) -> None:
    stage, sparse = Stage(sizes), params("mage", BUDGET)
    results, lists = run(stage, sparse)
    assert lists[0] == [None] * sizes.layers
    assert lists[1] == lists[2] == lists[3]
    [first, *_], [third, *_] = scenes(stage, sparse, 0), scenes(stage, sparse, 3)
    assert lists[3][0] == [held(first, g) for g in range(sizes.kv_heads)]
    assert lists[3][0] != [held(third, g) for g in range(sizes.kv_heads)]
    for one, two in pairwise(results):
        moved = (one.layers[0] - two.layers[0]).abs().amax((1, 2))
        assert int((moved > 1e-4).sum()) == sizes.block  # the in-block part alone would move all rows, too, …
    alike = Stage(sizes, rows=lambda s, n, b, t, i: (random_rows(s, n, b, t, i)[0], *random_rows(s, n, b, 0, i)[1:]))
    outs = [result.layers[0] for result in run(alike, sparse)[0]]
    assert all(bool((a - b).abs().amax() > 1e-3) for a, b in pairwise(outs))  # … but not with its K/V unchanged


def test_the_set_holds_the_most_mass_that_so_many_keys_can(sizes: Sizes) -> None:
    stage, sparse = Stage(sizes), params("mage", BUDGET)
    _, lists = run(stage, sparse, 2)
    for scene, layer in zip(scenes(stage, sparse), lists[1], strict=True):
        for g, chosen in enumerate(layer or []):
            alpha = average([masses(scene, row, head) for row in scene.rows for head in scene.group(g)])
            assert len(chosen) == BUDGET
            assert sum(alpha[key] for key in chosen) == pytest.approx(sum(sorted(alpha)[-BUDGET:]), rel=1e-6)


def test_the_next_block_selects_afresh(sizes: Sizes) -> None:
    stage, sparse = Stage(sizes), params("mage", BUDGET)
    _, before = run(stage, sparse, 2)
    _, after = run(stage, sparse, 2, start=PROMPT + 2 * sizes.block)
    assert before[1] != after[1]
    scene = scenes(stage, sparse, 0, PROMPT + 2 * sizes.block)[0]
    assert after[1][0] == [held(scene, g) for g in range(sizes.kv_heads)]


def test_dense_layers_read_everything_and_choose_nothing(sizes: Sizes) -> None:
    stage = Stage(sizes)
    results, lists = run(stage, params("mage", BUDGET, dense_layers=1), 2)
    assert lists[1][0] is None and lists[1][1] is not None
    opening, later = (result.report for result in results)
    assert opening is not None and later is not None
    assert opening.metadata_bytes == PROMPT * sizes.kv_heads * sizes.dim * 4
    assert later.kv_density == pytest.approx((1 + BUDGET / PROMPT) / 2) and not later.dense


def test_release_forgets_the_set_and_the_slot() -> None:
    stage = Stage()
    run(stage, params("mage", BUDGET), 2)
    method = stage.methods["mage"]
    method.release(0)
    with pytest.raises(AssertionError, match="without an opening step"):
        method._lists.lists(0, [0], (False,))  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="without an opening step"):  # also where nothing has to be held
        stage.forward(denoise_item("r", PROMPT, params("mage", PROMPT), 1, 0, stage.sizes))


class TestLayerAdaptive:
    """The budget of the first version."""

    def test_sets_are_those_of_algorithm_1(self, sizes: Sizes) -> None:
        stage, sparse = Stage(sizes, rows=focused), params("mage", 8, layer_adaptive=True)
        _, lists = run(stage, sparse)
        assert lists[1] == adaptive_sets(scenes(stage, sparse), minimum=1) and lists[1] == lists[3]

    def test_scattered_layers_get_more_of_one_budget(self) -> None:
        sizes = Sizes(layers=3)
        _, lists = run(Stage(sizes, rows=focused), params("mage", BUDGET, layer_adaptive=True))
        counts = [{len(chosen) for chosen in layer or []} for layer in lists[1]]
        assert all(len(layer) == 1 for layer in counts)  # KV heads of a layer read equally much
        first, *others = [layer.pop() for layer in counts]
        assert first < BUDGET < min(others)
        assert 3 * BUDGET - 3 < first + sum(others) <= 3 * BUDGET

    def test_minimum_budget_lifts_the_poorest_layer(self) -> None:
        sparse = params("mage", BUDGET, layer_adaptive=True, minimum_budget=BUDGET - 1)
        stage = Stage(Sizes(layers=3), rows=focused)
        _, lists = run(stage, sparse)
        assert [len(chosen) for chosen in lists[1][0] or []] == [BUDGET - 1] * 2
        assert lists[1] == adaptive_sets(scenes(stage, sparse), minimum=BUDGET - 1)

    def test_dense_layers_take_no_share(self) -> None:
        _, lists = run(
            Stage(Sizes(layers=2), rows=focused), params("mage", BUDGET, layer_adaptive=True, dense_layers=1)
        )
        assert lists[1][0] is None and [len(chosen) for chosen in lists[1][1] or []] == [BUDGET] * 2

    def test_a_request_gets_the_same_in_company(self, sizes: Sizes) -> None:
        """With one before it in a later step, and one behind it of another length and budget that opens with it."""
        sparse = params("mage", 8, layer_adaptive=True)
        company = {"y": (32, sparse), "r": (PROMPT, sparse), "x": (112, sparse._replace(token_budget=24))}
        stage = Stage(sizes)
        for name, (prompt, _) in company.items():
            stage.prefill(name, prompt)
        stage.denoise("y", 32, sparse, 1, slot=0)
        together = [
            stage.forward(
                *(
                    denoise_item(name, prompt, some, step + (name == "y"), slot, sizes)
                    for slot, (name, (prompt, some)) in enumerate(company.items())
                )
            )[1]
            for step in range(3)
        ]
        alone, _ = run(Stage(sizes, seed=3), sparse, 3)
        for mine, other in zip(together, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine.layers, other.layers, strict=True))

    def test_an_opening_that_was_cut_short_leaves_nothing(self) -> None:
        stage, sparse = Stage(), params("mage", BUDGET, layer_adaptive=True)
        stage.prefill("r", PROMPT)
        stage.denoise("r", PROMPT, sparse, 1)
        method = stage.methods["mage"]
        assert method._votes == {}  # type: ignore[attr-defined]
        method._votes[0] = {}  # type: ignore[attr-defined]
        method.release(0)
        assert method._votes == {}  # type: ignore[attr-defined]


def ballot(ranked: Lists) -> LayerVotes:
    return LayerVotes(tuple(torch.tensor(keys, dtype=torch.int64) for keys in ranked), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("count", "want"),
    [
        (2, [[4, 9], [0, 3]]),
        (3, [[1, 4, 9], [0, 3, 9]]),
        (5, [[1, 4, 7, 8, 9], [0, 3, 7, 8, 9]]),
        (12, [list(range(10))] * 2),
    ],
)
def test_a_short_union_is_filled_with_the_most_recent_keys(count: int, want: Lists) -> None:
    chosen = cut(ballot([[9, 4, 1], [3, 0]]), count, length=10)
    assert [head.nonzero().flatten().tolist() for head in chosen] == want


def test_votes_outweigh_mass_then_mass_outweighs_age() -> None:
    """Two voters with two votes each; scores are the keys' own numbers, a query of one channel scales them."""
    keys = torch.tensor([0.0, 3.0, 2.0, -8.0, 2.0])[None, :, None]
    q = torch.tensor([1.0, -0.5])[:, None, None]  # votes for 1 and (of the equal ones) 2, and for 3 and 0
    lse = torch.logsumexp(q[:, 0] * keys[0, :, 0], -1)[:, None]
    [ranked] = vote(q, lse, keys, 1.0, 2).ranked
    share = (q[:, 0] * keys[0, :, 0]).softmax(-1).mean(0)
    assert share[3] > share[1] > share[2] > share[0]
    assert ranked.tolist() == [3, 1, 2, 0]
    q = torch.tensor([1.0, 1.0, -0.5])[:, None, None]
    lse = torch.logsumexp(q[:, 0] * keys[0, :, 0], -1)[:, None]
    [ranked] = vote(q, lse, keys, 1.0, 2).ranked
    assert (q[:, 0] * keys[0, :, 0]).softmax(-1).mean(0)[3] > share[2]
    assert ranked.tolist() == [1, 2, 3, 0]


def test_equal_layers_share_equally_and_floors_lose_little() -> None:
    assert share_budget([0.1] * 7, 16, 1) == [16] * 7
    assert share_budget([1.0, 3.0], 16, 1) == [8, 24]
    assert share_budget([1.0, 1.0, 1.1], 10, 1) == [9, 9, 10]
    assert share_budget([1.0, 99.0], 16, 4) == [4, 31]


@pytest.mark.parametrize(
    ("options", "field", "allowed"),
    [
        ({"dense_layers": 2}, "dense_layers", "fewer than the model's 2 layers"),
        ({"dense_layers": -1}, "dense_layers", "greater than or equal to 0"),
        ({"minimum_budget": 4}, "minimum_budget", "absent without layer_adaptive"),
        ({"minimum_budget": 40, "layer_adaptive": True}, "minimum_budget", "at most the token budget, here 32"),
    ],
)
def test_refusals(options: dict[str, Any], field: str, allowed: str) -> None:
    wanted = DiffusionParams(sparse_method="mage", token_budget=32, sparse_options=options)
    with pytest.raises(InvalidRequest) as caught:
        resolve(wanted, EngineConfig.parse(model="m"), Stage().geometry)
    assert caught.value.field == f"custom_params.sparse_options.{field}" and allowed in caught.value.allowed

"""The probe: what it calls exact is exact, unions grow as they must, and changes are found where they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from benchmarks.quality.probe import __main__ as command
from benchmarks.quality.probe.locality import Changes
from benchmarks.quality.probe.play import Played, play, settle, walk
from benchmarks.quality.probe.union import PAPER, Choice, Unions
from benchmarks.quality.probe.watch import Seen
from benchmarks.quality.runner import Runner
from benchmarks.quality.samples import LATE_KEY, documents
from benchmarks.quality.scripts import Revealed, answers, late_keys
from benchmarks.quality.settings import Decoding, Setting
from benchmarks.quality.stage import Stage
from losa_runtime.attention.questions import PerSegment
from losa_runtime.core.batch import SparseParams

CONTEXT = 512
DENSE = Setting.of("dense", "dense")


class World:
    """One stored late key with its stage."""

    def __init__(self, model: Path) -> None:
        self.runner = Runner(str(model), 2 * CONTEXT)
        self.stage = Stage(self.runner)
        encode = self.runner.llm.tokenizer.encode
        [late] = documents(LATE_KEY, CONTEXT, 1, 1, seed=2)
        [script] = late_keys(late, encode, self.stage.block)
        self.stage.store(script.stored)
        self.revealed = settle(script, self.stage, self.params(DENSE), 2)
        [asked] = documents("multi_key", CONTEXT, 1, 1, seed=2)
        self.answer = next(answers(asked, encode, self.stage.block, 2, 0))

    def params(self, setting: Setting) -> SparseParams:
        return self.runner.resolve(setting, Decoding(8))

    def play(self, *settings: Setting) -> Played:
        return play(self.revealed, self.stage, [self.params(setting) for setting in settings])


@pytest.fixture(scope="module")
def world(bundled_checkpoint: Path) -> World:
    return World(bundled_checkpoint)


def of(name: str, tokens: int | None = None, **options: Any) -> Setting:
    return Setting(name, name, tokens, None, tuple(sorted(options.items())))


def test_dense_has_no_error_and_knows_the_code(world: World) -> None:
    played = world.play(DENSE, of("losa", 32))
    assert played.prefix_error[0].max() == played.output_error[0].max() == 0.0
    assert played.right[0].all()
    assert played.logprobs[0].min() > math.log(0.9)
    assert (played.read[0] == played.dense[0]).all()
    assert (played.read[1, 1:] < played.dense[1, 1:]).all()


def test_errors_are_those_of_reading_less(world: World) -> None:
    played = world.play(of("quest", 16), of("quest", 128), of("losa", 16), of("flashblock", refresh_tokens=16))
    quest, wide, losa, stale = played.prefix_error
    assert (quest[0] > 0.0).all()  # its first step is sparse
    assert losa[0].max() == stale[0].max() == 0.0
    assert (losa[1:] > 0.0).any(1).all()
    assert wide.mean() < quest.mean()
    assert stale[1:].mean(1)[-1] > stale[1].mean()  # what is remembered grows old
    assert (played.output_error <= played.prefix_error + 1e-9).mean() > 0.9  # the block's own part is exact


def test_a_setting_does_not_depend_on_its_company(world: World) -> None:
    alone, company = world.play(of("losa", 32)), world.play(DENSE, of("quest", 32), of("losa", 32))
    np.testing.assert_array_equal(alone.logprobs[0], company.logprobs[2])
    np.testing.assert_array_equal(alone.prefix_error[0], company.prefix_error[2])


def test_confidence_settles_the_order_of_an_answer(world: World) -> None:
    stage = Stage(world.runner)
    stage.store(world.answer.stored)
    revealed = settle(world.answer, stage, world.params(DENSE), 2)
    assert sorted(o for some in revealed.order for o in some) == list(range(world.answer.known, stage.block))
    assert all(len(some) == 2 for some in revealed.order[:-1])
    first = stage.show([world.params(DENSE)], revealed.tokens(0, stage.mask), 0, 0).logprobs_SBV[0].amax(-1)
    stage.end()
    left = sorted(range(world.answer.known, stage.block), key=lambda offset: -float(first[offset]))
    assert set(revealed.order[0]) == set(left[:2])
    stage.store(world.revealed.script.stored)


def test_unions_grow_with_the_rows_within_their_bounds(world: World) -> None:
    assert len(PAPER) == 16
    budget, prefix = 48, len(world.revealed.script.stored)
    shared, own = Choice(budget, "max"), Choice(budget, "none")
    unions = Unions([shared, own])
    walk(world.revealed, world.stage, world.params(DENSE), unions.note)
    curve, heads = unions.curve(shared), unions.curve(own)
    rows = np.arange(1, 17)
    assert len(unions.densities[shared]) == 4 * (len(world.revealed.order) - 1)  # layers, later steps
    assert curve[0] == pytest.approx(budget / prefix)
    assert (np.diff(curve) >= 0).all()
    assert (np.diff(heads) >= 0).all()
    assert (curve <= np.minimum(1.0, rows * budget / prefix) + 1e-9).all()
    assert (heads >= curve - 1e-9).mean() > 0.9  # heads of a group choose for themselves
    assert heads[0] > curve[0]


def test_the_union_of_all_rows_is_what_quest_reads(world: World) -> None:
    """In one layer's worth of queries that do not depend on what was read: those of the first step's dense rows."""
    choice = Choice(48, "max")
    unions = Unions([choice])
    seen: list[Seen] = []
    walk(world.revealed, world.stage, world.params(DENSE), lambda _, one: seen.append(one))
    unions.note(0, seen[0])
    unions.note(1, seen[4])  # layer 0 of the second step: what QUEST sees there, too
    assert (seen[0].layer, seen[4].layer) == (0, 0)
    best = PerSegment(torch.tensor([3]), (3,))
    kv = seen[4].backend.select_pages(0, seen[4].q_RHD, None, (False,), best, seen[4].group).kv
    assert unions.curve(choice)[-1] == pytest.approx(kv.indices.shape[0] * 16 / (2 * len(world.revealed.script.stored)))


def moved(changes: Changes, amounts: list[float]) -> None:
    """Two steps of one layer in which token i's query, key and value change by amounts[i]."""
    size = len(amounts)
    before = torch.zeros(size, 2, 4)
    after = torch.tensor(amounts).sqrt()[:, None, None].expand(size, 2, 4)
    for step, now in enumerate((before, after)):
        changes.note(step, cast(Seen, SimpleNamespace(layer=0, q_RHD=now, k_RGD=now, v_RGD=now)))


def test_changes_are_ranked_and_halved() -> None:
    changes = Changes()
    changes.order = ((1, 2), (0,))
    moved(changes, [1.0, 6.0, 2.0, 1.0])
    for what in ("query", "key", "value", "together"):
        np.testing.assert_allclose(changes.shares(what, 0), [0.6, 0.2, 0.1, 0.1], atol=1e-6)
        assert changes.tokens_for_half(what, 0) == 1.0
    assert changes.overlap(0, 2) == 1.0  # 1 and 2 were revealed and changed most
    assert changes.overlap(0, 1) == 0.5
    changes.order = ((3,), (0,))
    moved(changes, [1.0, 1.0, 1.0, 0.0])
    assert changes.overlap(0, 2) == pytest.approx(2 / 3)
    assert changes.tokens_for_half("query", 0) == pytest.approx((1 + 2) / 2)


def test_a_small_run_writes_figures_and_pictures(tmp_path: Path) -> None:
    out = tmp_path / "probe.json"
    few = ["--context", str(CONTEXT), "--documents", "1", "--per-document", "1", "--methods", "quest", "flashblock"]
    assert command.main([*few, "--budgets", "0.1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    names = [(o["kind"], o["name"]) for o in found["outcomes"] if o["name"] in ("dense", "quest")]
    assert names == [(kind, name) for kind in ("answer", LATE_KEY) for name in ("dense", "quest")]
    dense = found["outcomes"][0]
    assert dense["perplexity"] == pytest.approx(1.0, abs=0.1)
    assert dense["bytes_ratio"] == dense["block_bytes_ratio"] == 1.0
    assert len(found["changes"]) == 2 * 4
    assert {curve["heads"] for curve in found["unions"]} == {"max", "none"}
    for picture in ("cloze", "error", "union", "locality"):
        assert (tmp_path / f"probe_{picture}.png").stat().st_size > 10_000
        (tmp_path / f"probe_{picture}.png").unlink()
    written = out.read_text()
    assert command.main(["--report-only", "--out", str(out)]) == 0
    assert (out.read_text(), len(list(tmp_path.glob("*.png")))) == (written, 4)


def test_a_script_is_revealed_in_its_own_order(world: World) -> None:
    assert world.revealed == Revealed(world.revealed.script, world.revealed.script.order or ())

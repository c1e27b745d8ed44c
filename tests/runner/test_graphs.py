"""Recorded steps give what eager ones give, whatever the numbers; and what cannot be recorded is not.

The recorder is a tape: what the host said while it was made is frozen, as in a CUDA graph, so an input that is not
written anew shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from losa_runtime import LLM, SamplingParams
from losa_runtime.attention.device_group import DeviceGroup
from losa_runtime.attention.flashinfer_backend import FlashInferBackend
from losa_runtime.attention.triton_backend import TritonBackend
from losa_runtime.core.batch import ActiveRule, ForwardMode, SparseParams
from losa_runtime.core.errors import ConfigError
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.core.work import WorkItem
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from losa_runtime.runner import graphs
from losa_runtime.sparse.method import METHODS, method_class
from losa_runtime.sparse.step import DenoiseStep
from tests.attention import fake_flashinfer
from tests.runner.steps import (
    PAGE,
    PREFIXES,
    SIZES,
    SPARE,
    Asked,
    Pair,
    StepWorld,
    TapeRecorder,
    check_states,
    make_pair,
    params,
    play,
    recorded,
)
from tests.runner.tape import Tape

TAU = ActiveRule("tau", 0.6)


def pair(layers: int = 1) -> Pair:
    """One that records, one that does not."""
    return make_pair(TapeRecorder(), TritonBackend, layers)


def play_twice(worlds: Pair, asked: Asked) -> None:
    for step in (1, 2):
        play(worlds, step, asked)
        check_states(worlds)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LEAST_PREFIX", 64)


def test_losa_with_other_requests_lengths_rules_and_budgets() -> None:
    """One, three and two requests; one grows by two blocks and moves on to a larger bucket of prefixes."""
    worlds = pair()
    small, wide, share = (params("losa", *about) for about in ((8,), (16, ActiveRule("count", 2)), (8, TAU)))
    play(worlds, 0, [(0, small), (1, wide), (2, share)])
    play(worlds, 1, [(0, small), (1, wide), (2, share)])
    play(worlds, 2, [(2, share), (0, wide), (1, small)])
    play(worlds, 3, [(1, share)])
    play(worlds, 4, [(0, share), (2, wide), (1, small)])
    assert set(recorded(worlds)) == {("losa", 4, 64, 4), ("losa", 1, 64, 4)}
    for world in worlds:
        world.grow(0, 8)
    play(worlds, 0, [(0, small)])
    play(worlds, 1, [(0, small), (1, wide)])
    assert set(recorded(worlds)) == {("losa", 4, 64, 4), ("losa", 1, 64, 4), ("losa", 2, 128, 2)}
    check_states(worlds)


@pytest.mark.parametrize(
    "about", [params("dense"), params("quest", 16), params("losa", 16, dense_layers=1, reference="refresh")]
)
def test_other_methods_and_options(about: SparseParams) -> None:
    worlds = pair(layers=2 if about.method == "losa" else 1)
    play(worlds, 0, [(request, about) for request in range(3)])
    for step, requests in ((1, [0, 1, 2]), (2, [1, 2]), (3, [2, 0, 1])):
        play(worlds, step, [(request, about) for request in requests])
    rows = 1 if about.method == "losa" else 4
    assert set(recorded(worlds)) == {(about.method, 4, 64, rows), (about.method, 2, 64, rows)}
    check_states(worlds)


INPUTS = ("slots", "places", "budgets", "active counts", "active shares")


@pytest.mark.parametrize("left_out", [*INPUTS, "table", "prefix lengths", "tokens", "positions"])
def test_an_input_that_is_not_written_anew_shows(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if left_out in INPUTS:
        inputs = DenoiseStep._inputs.fget  # type: ignore[attr-defined]
        lacking = property(lambda step: {k: v for k, v in inputs(step).items() if k != left_out})
        monkeypatch.setattr(DenoiseStep, "_inputs", lacking)
    elif left_out in ("table", "prefix lengths"):
        numbers = DeviceGroup._numbers.fget  # type: ignore[attr-defined]
        place = ("table", "prefix lengths").index(left_out)
        lacking = property(lambda group: tuple(x for i, x in enumerate(numbers(group)) if i != place))
        monkeypatch.setattr(DeviceGroup, "_numbers", lacking)
    else:
        copied = {"tokens": "tokens_T", "positions": "positions_T"}[left_out]
        load = graphs.DenoiseGraphs._load

        def forgetful(self: graphs.DenoiseGraphs, graph: graphs._Graph, *rest: object) -> object:
            kept = getattr(graph.batch, copied).clone()
            out = load(self, graph, *rest)  # type: ignore[arg-type]
            getattr(graph.batch, copied).copy_(kept)
            return out

        monkeypatch.setattr(graphs.DenoiseGraphs, "_load", forgetful)
    worlds = pair()
    asked = [(0, params("losa", 8)), (1, params("losa", 16)), (2, params("losa", 8, TAU))]
    play(worlds, 0, asked)
    with pytest.raises(AssertionError):
        play_twice(worlds, asked)


def test_steps_in_which_no_row_is_recomputed() -> None:
    worlds = pair()
    none = params("losa", 8, ActiveRule("count", 0))
    for step in range(3):
        play(worlds, step, [(0, none), (1, none)])
    assert recorded(worlds) == [("losa", 2, 64, 0)]
    check_states(worlds)


def refused(items: list[WorkItem]) -> bool:
    """Whether there is no recording of such a round."""
    world = StepWorld(PREFIXES, TritonBackend)
    world.runner.record_steps(TapeRecorder(), SPARE, most=3)
    assert world.runner.graphs is not None
    return world.runner.graphs._bucket(items) is None


def test_what_is_not_recorded() -> None:
    world = StepWorld(PREFIXES, TritonBackend)
    losa, quest = params("losa"), params("quest")
    later = [world.item(request, 1, losa) for request in range(4)]
    assert not refused(later[:3])
    assert refused(later), "more than the largest bucket"
    assert refused([*later[:2], world.item(2, 0, losa)]), "a first step among them"
    assert refused([later[0], world.item(1, 1, quest)]), "two methods"
    assert refused([later[0], world.item(1, 1, params("losa", dense_layers=1))]), "other options"
    assert refused([later[0], world.item(2, 1, params("losa", 32))]), "a prefix within the budget"
    assert refused([later[0], later[1]._replace(mode=ForwardMode.COMMIT, sparse=None)]), "a commit"
    assert refused([later[0]._replace(mode=ForwardMode.SCORE, sparse=None)]), "a score"
    assert not refused([world.item(2, 1, params("dense", 32))]), "it has no budget"


@pytest.mark.parametrize("method", METHODS)
def test_methods_say_what_can_be_recorded(method: str) -> None:
    cls = method_class(method)
    can = {"dense", "quest", "losa"}
    assert cls.recordable(cls.Options()) == (method in can)
    if method in ("quest", "losa"):
        for options in ({"share": "none"}, {"pages": "own"}):
            assert not cls.recordable(cls.Options(**options))
    if method == "losa":
        for options in ({"granularity": "head"}, {"refresh_every": 2}):
            assert not cls.recordable(cls.Options(**options))


def test_an_engine_answers_the_same(tmp_path: Path) -> None:
    """Two requests with unlike methods, together and alone: some of their later steps are recorded, first steps and
    commits never are; and every forward is counted."""
    write_random_checkpoint(tmp_path, "tiny", num_hidden_layers=1, head_dim=16, **SIZES)
    wishes = [DiffusionParams(sparse_method=name, denoising_steps=2) for name in ("losa", "losa", "dense")]
    asked = [
        SamplingParams(temperature=0.0, max_new_tokens=new, ignore_eos=True, custom_params=wish)
        for new, wish in zip((8, 16, 4), wishes, strict=True)
    ]
    prompts = [[(7 * i + j) % 250 for i in range(40 + 4 * j)] for j in range(3)]
    told = []
    for recording in (True, False):
        options = {"token_budget": 16, "page_size": PAGE, "max_total_tokens": 400, "attention_backend": "triton"}
        llm = LLM(model=str(tmp_path), max_running_requests=3, **options)
        runner = llm.engine.parts.runner
        if recording:
            runner.record_steps(TapeRecorder(), spare_slot=2, most=2, patience=1)
        pairs = [llm.generate(some, params) for some, params in ((prompts[:2], asked[:2]), (prompts[2:], asked[2:]))]
        told.append([(answer.token_ids, answer.stats.kv_bytes) for answers in pairs for answer in answers])
        if recording:
            stats, steps = llm.engine.stats(), sum(a.stats.denoise_steps for answers in pairs for a in answers)
            assert stats["recorded_graphs"] == 3 and 0 < int(str(stats["graph_forwards"])) < steps
    assert told[0] == told[1]


def test_options_for_what_is_not_there_are_refused(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, "tiny", num_hidden_layers=1, head_dim=16, **SIZES)
    for options, why in (({}, "on cpu"), ({"disable_cuda_graph": True}, "beside disable_cuda_graph")):
        with pytest.raises(ConfigError, match=f"cuda_graph_max_bs: found 8, allowed: absent {why}"):
            LLM(model=str(tmp_path), device="cpu", cuda_graph_max_bs=8, **options)
    llm = LLM(model=str(tmp_path), device="cpu", disable_cuda_graph=True, page_size=PAGE)
    assert llm.engine.info()["cuda_graph_max_bs"] == 0 and llm.engine.stats()["recorded_graphs"] == 0


@pytest.mark.parametrize("method", ["dense", "quest", "losa"])
def test_flashinfer_is_recorded_too(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plans for lists are made before; a whole prefix, whose length only the device knows, is a list."""
    fake_flashinfer.install(monkeypatch)
    worlds = make_pair(TapeRecorder(), FlashInferBackend, dtype=torch.float16, head_dim=64)
    for step, requests in ((0, (0, 1, 2)), (1, (0, 1, 2)), (2, (2, 1, 0))):
        play(worlds, step, [(request, params(method)) for request in requests], tolerance=2e-2)
    assert recorded(worlds) == [(method, 4, 64, 1 if method == "losa" else 4)]


class Fussy:
    """Records on a tape, unless it is told that it cannot; counts."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.made = fails, 0

    def record(self, run: Callable[[], None]) -> Tape:
        self.made += 1
        if self.fails:
            raise RuntimeError("the stream cannot be captured")
        return TapeRecorder().record(run)


def test_a_recording_is_made_when_it_has_been_wanted_several_times() -> None:
    world, about = StepWorld(PREFIXES, TritonBackend), params("dense")
    recorder = Fussy()
    world.runner.record_steps(recorder, SPARE, most=4)
    found = world.runner.graphs
    assert found is not None
    for step in range(1, 5):
        world.run([world.item(0, step, about)])
        assert recorder.made == len(found.recorded) == (step >= graphs.PATIENCE)
    assert found.runs == 2


def test_recordings_that_have_not_been_wanted_for_long_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests choose options, so they could ask for any number of them."""
    monkeypatch.setattr(graphs, "MOST_KNOWN", 2)
    recorder = Fussy()
    worlds = make_pair(recorder, TritonBackend)
    kinds = [params("quest", 16, dense_layers=layers) for layers in range(3)]
    for step, kind in enumerate((0, 1, 0, 2, 0, 1), start=1):
        play(worlds, step, [(0, kinds[kind])])
    assert recorder.made == 4 and len(recorded(worlds)) == 2


def test_a_step_that_cannot_be_recorded_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Fussy(fails=True)
    worlds = make_pair(recorder, TritonBackend)
    for step in range(1, 4):
        play(worlds, step, [(0, params("quest", 16))])
    assert recorder.made == 1 and recorded(worlds) == []
    assert "could not be recorded; they run eagerly" in caplog.text and "cannot be captured" in caplog.text

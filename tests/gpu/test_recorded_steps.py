"""CUDA graphs of later steps, with the backends that can be recorded; and the clock that measures on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention_clock import DeviceClock
from losa_runtime import LLM
from losa_runtime.attention.flashinfer_backend import FlashInferBackend
from losa_runtime.attention.triton_backend import TritonBackend
from losa_runtime.core.batch import ActiveRule
from losa_runtime.runner import graphs
from losa_runtime.runner.cuda_recorder import CudaRecorder
from tests.gpu.test_engine import requests
from tests.kernels.interpreter import DEVICE
from tests.runner.steps import check_states, make_pair, params, play, recorded

pytestmark = pytest.mark.gpu

KINDS: dict[str, dict[str, Any]] = {
    "triton": {"backend": TritonBackend},
    "triton_bf16": {"backend": TritonBackend, "dtype": torch.bfloat16, "head_dim": 64},
    "flashinfer": {"backend": FlashInferBackend, "dtype": torch.bfloat16, "head_dim": 128},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dense", "quest", "losa"])
def test_replayed_steps_are_those_of_eager_ones(method: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers; other requests, orders, lengths, budgets and rules under one recording, and a second bucket."""
    monkeypatch.setattr(graphs, "LEAST_PREFIX", 64)
    tolerance = 1e-4 if kind == "triton" else 3e-2
    worlds = make_pair(CudaRecorder(DEVICE), layers=2, **KINDS[kind])
    small, wide = params(method, 8), params(method, 16, ActiveRule("count", 2))
    share = params(method, 8, ActiveRule("tau", 0.6))
    play(worlds, 0, [(0, small), (1, wide), (2, share)], tolerance)
    for step, asked in enumerate(([0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2]), start=1):
        about = {0: small, 1: wide, 2: share}
        play(worlds, step, [(request, about[request]) for request in asked], tolerance)
    for world in worlds:
        world.grow(0, 8)
    play(worlds, 0, [(0, share)], tolerance)
    play(worlds, 1, [(0, share), (1, wide)], tolerance)
    assert [prefix for _, _, prefix, _ in recorded(worlds)] == [64, 64, 128]
    if kind == "triton":
        check_states(worlds, tolerance)


def answers(checkpoint: Path, **options: Any) -> tuple[list[tuple[int, ...]], dict[str, object]]:
    llm = LLM(model=str(checkpoint), device="cuda", dtype="float32", max_total_tokens=32768, **options)
    return [answer.token_ids for answer in llm.generate(*requests())], llm.engine.stats()


def test_an_engine_answers_the_same_with_graphs_and_overlap(bundled_checkpoint: Path) -> None:
    plain, stats = answers(bundled_checkpoint, disable_cuda_graph=True, overlap_schedule="off")
    assert stats["graph_forwards"] == 0
    # One at a time: rounds of several methods are never recorded.
    for options in ({}, {"max_running_requests": 1}, {"cuda_graph_max_bs": 1, "max_running_requests": 2}):
        got, stats = answers(bundled_checkpoint, **options)
        assert got == plain
        if options.get("max_running_requests") == 1:
            assert int(str(stats["graph_forwards"])) > 0 and int(str(stats["recorded_graphs"])) > 0


def test_a_device_is_timed_by_itself() -> None:
    """The host is slow, the device is not: only what the device does counts, and parts add up to no more than all."""
    clock, x = DeviceClock(DEVICE), torch.randn(2048, 2048, device=DEVICE)

    def call() -> None:
        with clock.part("products"):
            for _ in range(4):
                torch.mm(x, x)
        x.sum()

    clock.measure(call)
    found = clock.measure(call)
    assert 0.0 < found.parts["products"] <= found.seconds and found.host > 0.0

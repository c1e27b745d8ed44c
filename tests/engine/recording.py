"""The logits of every candidate row of some requests, while an engine answers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.work import BlockResult, Round
from losa_runtime.runner.model_runner import Launched

Bits = dict[tuple[int, int, int], Tensor]  # (seed of the request, position, step) -> logits


def logits_of(llm: LLM, asked: Sequence[tuple[list[int], SamplingParams]]) -> tuple[Bits, int]:
    """The logits of every candidate row, and how often a request was retracted."""
    runner = llm.engine.parts.runner
    seen: Bits = {}
    rows: list[Tensor] = []
    launch, logits = runner.launch, type(runner.model).logits

    def recording_logits(self: Any, hidden: Tensor) -> Tensor:
        out: Tensor = logits(self, hidden)
        rows.extend(out.clone())
        return out

    def recording_launch(work: Round) -> Launched:
        flight = launch(work)
        return Launched(work, lambda: recorded(work, flight))

    def recorded(work: Round, flight: Launched) -> list[BlockResult]:
        rows.clear()
        results = flight.wait()
        owners = [(item, at) for item in work.items if not item.mode.stores for at in item.candidates]  # type: ignore[union-attr]
        for (item, offset), row in zip(owners, rows, strict=True):
            seen[int(item.context.seed), int(item.start + offset), item.step] = row  # type: ignore[union-attr]
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(runner.model), "logits", recording_logits)
        patch.setattr(runner, "launch", recording_launch)
        answers = llm.generate([ids for ids, _ in asked], [params for _, params in asked])
    return seen, sum(answer.stats.retractions for answer in answers)

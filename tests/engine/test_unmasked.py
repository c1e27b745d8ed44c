"""What a method is told of a block's progress is what the engine did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.batch import ForwardBatch
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.core.work import WorkItem

PROMPT = list(range(30, 70))  # two blocks and a half


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return LLM(model=str(tiny_checkpoint), max_total_tokens=4096)


def answer(llm: LLM, method: str, steps: int = 8, **options: int) -> Any:
    custom = DiffusionParams(
        sparse_method=method, sparse_options=options, algorithm="low_confidence_static", denoising_steps=steps
    )
    params = SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True, custom_params=custom)
    return llm.generate([PROMPT], params)[0]


def test_segments_count_the_tokens_accepted_before(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, seen = llm.engine.parts.runner, []
    ask, mask = runner.tensors, llm.engine.parts.runner.model.config.mask_token_id

    def spy(items: tuple[WorkItem, ...]) -> ForwardBatch:
        batch = ask(items)
        for item, segment in zip(items, batch.segments, strict=True):
            if not item.mode.stores:
                seen.append((segment.step, segment.unmasked, int((item.tokens != mask).sum()) - item.known))
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(runner, "tensors", spy)
        answer(llm, "flashblock")
    assert all(unmasked == known for _, unmasked, known in seen)
    assert max(unmasked for _, unmasked, _ in seen) >= 7 and all(u == 0 for step, u, _ in seen if step == 0)


def test_flashblock_refreshes_as_tokens_come(llm: LLM) -> None:
    """Two tokens a step: four steps for the eight positions of the first block, six for the twelve of the second."""
    dense, every = answer(llm, "dense"), answer(llm, "flashblock", refresh_tokens=0)
    assert every.token_ids == dense.token_ids == answer(llm, "flashblock", refresh_tokens=1).token_ids
    assert every.stats.kv_density == 1.0
    assert answer(llm, "flashblock", refresh_tokens=16).stats.kv_density == 0.0
    assert answer(llm, "flashblock", refresh_tokens=4).stats.kv_density == (1 + 2) / (3 + 5)

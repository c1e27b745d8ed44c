"""Free pages are filled with NaN: nothing that was freed, or never written, is ever read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.request import Request
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.method import METHODS, method_class

PROMPTS = [[66 + (7 * i + 3 * j) % 150 for i in range(37 + 9 * j)] for j in range(5)]


def wish(method: str, **values: Any) -> SamplingParams:
    budget: dict[str, Any] = {"token_budget": 32} if method_class(method).has_budget else {}
    custom = DiffusionParams(sparse_method=method, algorithm="low_confidence_static", denoising_steps=2, **budget)
    base: dict[str, Any] = {"temperature": 0.7, "max_new_tokens": 50, "ignore_eos": True, "custom_params": custom}
    return SamplingParams(**{**base, **values})


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(("block", "page"), [(16, 16), (4, 16), (16, 8)])
def test_tokens_are_the_same_under_pressure(
    tiny_checkpoint: Path, tiny_b4_checkpoint: Path, backend: str, block: int, page: int
) -> None:
    """All methods at once, on a pool that makes them give way and start again, with aborts in between."""
    model = str(tiny_checkpoint if block == 16 else tiny_b4_checkpoint)
    params = [wish(method, sampling_seed=i) for i, method in enumerate(METHODS)]
    prompts = [PROMPTS[i % 5] for i in range(len(params))]
    calm = LLM(model=model, max_total_tokens=8192, attention_backend=backend, page_size=page)
    want = [a.token_ids for a in calm.generate(prompts, params)]
    llm = LLM(model=model, max_total_tokens=480, attention_backend=backend, page_size=page, debug_poison_pages=True)
    assert llm.engine.info()["debug_poison_pages"] is True
    pool = llm.engine.parts.runner.backend.pool
    assert pool.k(0).isnan().all() and pool.v(1).isnan().all()
    for i in range(3):
        llm.engine.add(Request(rid=f"aborted-{i}", prompt_ids=tuple(PROMPTS[i]), sampling=wish("losa_plus")))
    for i in range(3):
        llm.engine.step()
        llm.engine.abort(f"aborted-{i}")
    llm.engine.step()
    answers = llm.generate(prompts, params)
    assert [a.token_ids for a in answers] == want
    assert sum(a.stats.retractions for a in answers) > 0
    assert llm.engine.stats()["pages_evicted"]
    assert llm.engine.flush_cache() and pool.k(0).isnan().all()


def test_a_page_that_is_read_after_it_was_freed_shows(tiny_checkpoint: Path) -> None:
    llm = LLM(model=str(tiny_checkpoint), max_total_tokens=480, debug_poison_pages=True)
    llm.engine.add(Request(rid="r", prompt_ids=tuple(PROMPTS[4]), sampling=wish("dense")))
    llm.engine.step()
    [req] = llm.engine.scheduler.running
    assert req.lease is not None
    llm.engine.parts.runner.backend.pool.poison(req.lease.pages[:1].copy())  # as if it had been freed by mistake
    outputs = [output for _ in range(9) for output in llm.engine.step()]
    assert outputs[-1].finish is not None and "not finite" in str(outputs[-1].finish.message)

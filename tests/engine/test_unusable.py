"""A request whose keys and values are no numbers ends with an error, alone, whatever method it chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.core.work import nothing
from losa_runtime.sparse.method import METHODS, method_class

POISON = 65  # a token whose embedding is broken
HEALTHY = [66 + 7 * i % 150 for i in range(200)]
BROKEN = [*HEALTHY[:40], POISON, *HEALTHY[41:]]
CHOICES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in METHODS] + [
    ("losa", {"first_step": "sparse"}),
    ("losa_plus", {"granule": "page"}),
    ("mage", {"layer_adaptive": True}),
    ("ba_att", {"block_size": 16}),
    ("ba_att", {"block_size": 16, "sort": False}),
]


@pytest.fixture(scope="module", params=["native", "torch"])
def llm(tiny_checkpoint: Path, request: pytest.FixtureRequest) -> LLM:
    llm = LLM(
        model=str(tiny_checkpoint),
        attention_backend=request.param,
        max_total_tokens=4096,
        sparse_methods=tuple(METHODS),
    )
    names = dict(llm.engine.parts.runner.model.named_parameters())
    [embedding] = [tensor for name, tensor in names.items() if "embed" in name]
    with torch.no_grad():
        embedding[POISON] = torch.nan
    return llm


@pytest.mark.parametrize(("method", "options"), CHOICES, ids=str)
def test_broken_keys_end_their_own_request_only(
    llm: LLM, method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under dense attention; a method whose scores are no numbers neither raises nor reads around what is broken.

    The runner would not let broken keys get that far: here it looks away.
    """
    runner = llm.engine.parts.runner
    blind = lambda batch, hidden: [nothing() for segment in batch.segments if segment.mode.stores]  # noqa: E731
    monkeypatch.setattr(runner, "stored", blind)
    wish: dict[str, Any] = {"token_budget": 32} if method_class(method).has_budget else {}
    custom = DiffusionParams(
        sparse_method=method, sparse_options=options, algorithm="low_confidence_static", denoising_steps=4, **wish
    )
    params = SamplingParams(
        temperature=0, max_new_tokens=24, ignore_eos=True, logit_bias={POISON: -1000.0}, custom_params=custom
    )
    [alone] = llm.generate([HEALTHY], params)
    before = llm.engine.stats()
    bad, good = llm.generate([BROKEN, HEALTHY], params)
    after = llm.engine.stats()
    for field in ("denoise_steps", "kv_bytes", "dense_bytes"):
        assert after[field] - before[field] == getattr(bad.stats, field) + getattr(good.stats, field)  # type: ignore[operator]
    assert bad.finish.type == "error" and "not finite" in str(bad.finish.message)
    assert good.finish.type == "length" and good.token_ids == alone.token_ids

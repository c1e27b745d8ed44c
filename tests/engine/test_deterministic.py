"""Deterministic mode: the logits of a row are the same bits alone, in company, cut, cached or fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.sampling_params import DiffusionParams
from tests.engine.recording import Bits, logits_of
from tests.engine.test_exact import prompt

SHARED = prompt(48, seed=0)
PROMPTS = [SHARED + prompt(n, seed=n) for n in (3, 16, 100, 333)]
METHODS = ["dense", "losa", "quest", "losa_plus", "mage"]


def logits_by_row(llm: LLM, prompts: list[list[int]], method: str) -> Bits:
    """Logits of every candidate row, by (prompt, position, step)."""
    custom: dict[str, Any] = {"sparse_method": method, "algorithm": "low_confidence_static", "denoising_steps": 5}
    if method != "dense":
        custom["token_budget"] = 32
    params = [
        SamplingParams(temperature=0.7, sampling_seed=i, max_new_tokens=37, custom_params=DiffusionParams(**custom))
        for i in range(len(prompts))
    ]
    return logits_of(llm, list(zip(prompts, params, strict=True)))[0]


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path) -> dict[str, Bits]:
    options: dict[str, Any] = {"deterministic": True, "max_total_tokens": 4096, "max_running_requests": 1}
    llm = LLM(model=str(tiny_checkpoint), disable_radix_cache=True, disable_fused_commit=True, **options)
    return {method: logits_by_row(llm, PROMPTS, method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunked_prefill_size": 16},
        {"chunked_prefill_size": 80, "disable_fused_commit": True},
        {"max_total_tokens": 640},
    ],
    ids=str,
)
def test_logits_are_the_same_bits(
    tiny_checkpoint: Path,
    alone: dict[str, Bits],
    options: dict[str, Any],
    method: str,
) -> None:
    llm = LLM(model=str(tiny_checkpoint), deterministic=True, **{"max_total_tokens": 4096, **options})
    for attempt in ("cold", "warm"):
        got = logits_by_row(llm, PROMPTS, method)
        assert got.keys() == alone[method].keys()
        wrong = [row for row, logits in got.items() if not torch.equal(logits, alone[method][row])]
        assert not wrong, f"{attempt}: {len(wrong)} of {len(got)} rows differ, the first at {wrong[0]}"

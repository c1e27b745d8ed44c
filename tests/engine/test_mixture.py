"""All methods at once in one engine: each request gets the bits that it gets alone, on either backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.decoding.registry import ALGORITHMS
from losa_runtime.sparse.method import METHODS, method_class
from tests.engine.recording import Bits, logits_of
from tests.engine.test_exact import prompt

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("losa", {"granularity": "head", "refresh_every": 3}),
    ("losa_plus", {"granule": "page"}),
    ("mage", {"layer_adaptive": True}),
    ("ba_att", {"block_size": 8, "first_step": "dense"}),
    ("ba_att", {"block_size": 16, "sort": False, "variance_layers": "all"}),
]


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Every method by default and with some options; prompts share a beginning, and end anywhere in a block."""
    shared, made = prompt(60, seed=0), []
    choices = [(name, {}) for name in METHODS] + OPTIONS
    for number, (method, options) in enumerate(choices):
        wish: dict[str, Any] = {"token_budget": 16} if method_class(method).has_budget else {}
        custom = DiffusionParams(
            sparse_method=method,
            sparse_options=options,
            algorithm=tuple(ALGORITHMS)[number % len(ALGORITHMS)],
            denoising_steps=2 + number % 3,
            **wish,
        )
        ids = (shared if number % 2 else []) + prompt(7 * number + 1, seed=number)
        params = SamplingParams(
            temperature=0.7, sampling_seed=number, max_new_tokens=33, ignore_eos=True, custom_params=custom
        )
        made.append((ids, params))
    return made


@pytest.fixture(scope="module", params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(tiny_b4_checkpoint: Path, backend: str) -> Bits:
    """Without company, cache, cuts and fusion."""
    llm = LLM(
        model=str(tiny_b4_checkpoint),
        attention_backend=backend,
        deterministic=True,
        sparse_methods=tuple(METHODS),  # by name: pages keep whatever helps one of them
        max_total_tokens=2048,
        max_running_requests=1,
        disable_radix_cache=True,
        disable_fused_commit=True,
    )
    return logits_of(llm, requests())[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"chunked_prefill_size": 4}, {"chunked_prefill_size": 24, "max_total_tokens": 192}],
    ids=str,
)
def test_company_cuts_caches_and_retraction_change_no_bit(
    tiny_b4_checkpoint: Path, backend: str, alone: Bits, options: dict[str, Any]
) -> None:
    given = {"max_total_tokens": 2048, "sparse_methods": tuple(METHODS), **options}
    llm = LLM(model=str(tiny_b4_checkpoint), attention_backend=backend, deterministic=True, **given)
    for _ in range(2):  # the second time on a warm cache
        got, retractions = logits_of(llm, requests())
        wrong = [row for row, bits in got.items() if not torch.equal(bits, alone[row])]
        assert got.keys() == alone.keys() and not wrong, f"{len(wrong)} of {len(got)} rows, the first at {min(wrong)}"
        assert (retractions > 0) == ("max_total_tokens" in options)

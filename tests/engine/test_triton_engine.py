"""The whole engine on the Triton backend, in its interpreter: tokens and costs are those of the torch backend."""

from __future__ import annotations

from pathlib import Path

import pytest

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.sampling_params import DiffusionParams
from tests.engine.test_exact import prompt
from tests.kernels.platforms import INTERPRETED


@pytest.mark.slow
@pytest.mark.parametrize("backend", INTERPRETED)
def test_all_methods_in_one_batch_give_the_tokens_of_the_torch_backend(tiny_b4_checkpoint: Path, backend: str) -> None:
    """Prompts with a common beginning, cut in chunks, pages reused, blocks committed and opened at once."""
    methods = ("dense", "quest", "losa", "losa_plus", "mage", "flashblock")
    prompts = [prompt(24, seed=0) + prompt(3 * n, seed=n) for n in range(len(methods))]
    wishes = []
    for method in methods:
        budget = {} if method in ("dense", "flashblock") else {"token_budget": 8}
        custom = DiffusionParams(sparse_method=method, denoising_steps=3, **budget)
        wishes.append(SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True, custom_params=custom))
    found = []
    for name in (backend, "torch"):
        llm = LLM(
            model=str(tiny_b4_checkpoint),
            attention_backend=name,
            page_size=4,
            max_total_tokens=1024,
            chunked_prefill_size=40,
            show_progress=False,
        )
        assert name in llm.engine.parts.info()["attention_backend"].lower()
        found.append(llm.generate(prompts, wishes))
    for mine, reference in zip(*found, strict=True):
        assert mine.token_ids == reference.token_ids
        assert mine.stats.kv_density == pytest.approx(reference.stats.kv_density, abs=1e-9)

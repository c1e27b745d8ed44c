"""The engine with its GPU backends on the bundled model: the tokens of the torch backend, whatever the company."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.batch import ForwardMode
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.core.work import Round
from losa_runtime.runner.model_runner import Launched, ModelRunner
from tests.gpu.waiting import nobody_waits

pytestmark = pytest.mark.gpu


def prompt(length: int, seed: int) -> list[int]:
    """Ordinary ids of the bundled model: none of them is a mask."""
    return torch.randint(10, 1600, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


METHODS = ("dense", "quest", "losa", "losa_plus", "mage", "flashblock")


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Every method over prompts of 300 to 1,300 tokens, some of which begin alike."""
    prompts, params = [], []
    for number, method in enumerate(METHODS * 2):
        prompts.append((prompt(200, seed=0) if number % 2 else []) + prompt(300 + 100 * number, seed=number))
        budget: dict[str, Any] = {} if method in ("dense", "flashblock") else {"token_budget": 128}
        custom = DiffusionParams(sparse_method=method, denoising_steps=8, **budget)
        params.append(SamplingParams(temperature=0, max_new_tokens=48, ignore_eos=True, custom_params=custom))
    return prompts, params


def tokens(checkpoint: Path, backend: str, **options: Any) -> list[tuple[int, ...]]:
    config = {"device": "cuda", "max_total_tokens": 32768, "show_progress": False, **options}
    llm = LLM(model=str(checkpoint), attention_backend=backend, **config)
    return [completion.token_ids for completion in llm.generate(*requests())]


def test_the_tokens_of_the_torch_backend(bundled_checkpoint: Path) -> None:
    """In float32, where two orders of summing differ by less than what decides about a token."""
    want = tokens(bundled_checkpoint, "torch", dtype="float32")
    assert tokens(bundled_checkpoint, "triton", dtype="float32") == want
    assert tokens(bundled_checkpoint, "auto", dtype="float32", max_running_requests=2) == want


def test_company_changes_no_token_in_16_bits(bundled_checkpoint: Path) -> None:
    """In bfloat16 with `deterministic`: one at a time, all at once, and prompts cut in chunks."""
    alone = tokens(bundled_checkpoint, "triton", deterministic=True, max_running_requests=1)
    assert tokens(bundled_checkpoint, "triton", deterministic=True) == alone
    assert tokens(bundled_checkpoint, "triton", deterministic=True, chunked_prefill_size=160) == alone


@pytest.mark.parametrize("method", ["dense", "quest", "losa", "mage", "flashblock"])
def test_launching_a_later_step_waits_for_nothing(
    bundled_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """From the rows on the host to the queued model: only the results are waited for."""
    launch, watched = ModelRunner.launch, 0

    def watching(self: ModelRunner, work: Round) -> Launched:
        nonlocal watched
        later = bool(work.items) and all(item.mode is ForwardMode.DENOISE for item in work.items)
        watched += later
        with nobody_waits() if later else nullcontext():
            return launch(self, work)

    monkeypatch.setattr(ModelRunner, "launch", watching)
    options = {"sparse_method": method} | ({} if method in ("dense", "flashblock") else {"token_budget": 128})
    llm = LLM(model=str(bundled_checkpoint), device="cuda", max_total_tokens=16384, show_progress=False, **options)
    params = SamplingParams(temperature=0, max_new_tokens=32, ignore_eos=True)
    llm.generate([prompt(500, seed=1), prompt(900, seed=2)], params)
    assert watched

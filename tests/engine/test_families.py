"""Every model family through the engine: the plain loop's tokens, whatever backend, method, company, cache and cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.architectures import SUPPORTED
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from losa_runtime.sparse.method import METHODS, method_class
from tests.engine import plain_loop
from tests.kernels.platforms import INTERPRETED
from tests.sparse.cases import CASES

BLOCK = 8
ON_CPU = ["native", "torch", *INTERPRETED]
Make = Callable[..., LLM]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """An engine for an architecture, with options."""

    @cache
    def folder(architecture: str) -> Path:
        made = tmp_path_factory.mktemp(architecture)
        write_random_checkpoint(made, architecture=architecture, seed=5, block_size=BLOCK)
        return made

    def engine(architecture: str, **options: Any) -> LLM:
        settings = {"page_size": BLOCK, "max_total_tokens": 512, **options}
        return LLM(model=str(folder(architecture)), show_progress=False, **settings)

    return engine


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(new: int, **custom: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=new, custom_params=DiffusionParams(**custom))


def by_the_plain_loop(llm: LLM, ids: list[int], new: int, steps: int) -> list[int]:
    stop = tuple(llm.engine.parts.eos_token_ids)
    model, size = llm.engine.parts.runner.model, llm.tokenizer.vocab_size
    return plain_loop.generate(model, ids, new, steps, "low_confidence_static", vocab_size=size, stop=stop)


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_tokens_equal_the_plain_loop(make: Make, architecture: str) -> None:
    llm = make(architecture)
    assert llm.engine.info()["architecture"] == architecture
    for length, new in ((1, 13), (8, 9), (15, 1), (15, 18), (24, 16)):
        ids = prompt(length, seed=length)
        [got] = llm.generate([ids], greedy(new, algorithm="low_confidence_static", denoising_steps=3))
        assert list(got.token_ids) == by_the_plain_loop(llm, ids, new, 3), (length, new)


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_company_cuts_caches_and_retraction_change_nothing(make: Make, architecture: str) -> None:
    shared = prompt(16, seed=0)
    wishes = [
        (shared, greedy(19, denoising_steps=4)),
        (shared + prompt(3, 1), SamplingParams(temperature=0.9, sampling_seed=5, max_new_tokens=17, ignore_eos=True)),
        (prompt(24, 2), SamplingParams(temperature=0.7, sampling_seed=6, max_new_tokens=24, frequency_penalty=0.5)),
        (prompt(24, 2), greedy(12, sparse_method="losa", token_budget=8, denoising_steps=3)),
    ]
    single = make(architecture, disable_radix_cache=True)
    alone = [single.generate([ids], wish)[0].token_ids for ids, wish in wishes]
    retractions = 0
    for options in ({"chunked_prefill_size": 8}, {"max_total_tokens": 64}):
        llm = make(architecture, **options)
        for _ in range(2):  # the second time on a warm cache
            got = llm.generate([ids for ids, _ in wishes], [wish for _, wish in wishes])
            assert [g.token_ids for g in got] == alone
            retractions += sum(g.stats.retractions for g in got)
        assert llm.engine.parts.cache.owned_pages == 0
    assert retractions > 0


def sparse_equals_dense(llm: LLM, method: str) -> None:
    asks: dict[str, Any] = {"sparse_method": method, "sparse_options": CASES[method].full}
    if method_class(method).has_budget:
        asks["token_budget"] = 64
    if method_class(method).has_active_rows:
        asks["active_tokens"] = BLOCK
    ids = prompt(27, seed=12)
    [dense] = llm.generate([ids], greedy(14, sparse_method="dense", denoising_steps=4))
    [sparse] = llm.generate([ids], greedy(14, denoising_steps=4, **asks))
    assert dense.token_ids == sparse.token_ids, method


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_full_budgets_equal_dense(make: Make, architecture: str) -> None:
    llm = make(architecture)
    for method in ("quest", "losa", "losa_plus"):
        sparse_equals_dense(llm, method)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("architecture", SUPPORTED)
def test_every_backend_and_method(make: Make, architecture: str, backend: str) -> None:
    llm = make(architecture, attention_backend=backend)
    ids = prompt(21, seed=9)
    [got] = llm.generate([ids], greedy(14, algorithm="low_confidence_static", denoising_steps=3))
    assert list(got.token_ids) == by_the_plain_loop(llm, ids, 14, 3)
    for method in METHODS:
        if method != "dense":
            sparse_equals_dense(llm, method)


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_deterministic_mode_gives_the_same_bits_in_company(make: Make, architecture: str) -> None:
    llm = make(architecture, deterministic=True)
    prompts = [prompt(n, seed=n) for n in (9, 16, 5)]
    wish = SamplingParams(temperature=0.0, max_new_tokens=10, custom_params=DiffusionParams(denoising_steps=2))
    alone = [llm.generate([ids], wish, logprobs=True)[0] for ids in prompts]
    llm.engine.flush_cache()
    for mine, theirs in zip(llm.generate(prompts, wish, logprobs=True), alone, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.logprobs and mine.logprobs == theirs.logprobs

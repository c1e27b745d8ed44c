"""Blocks that end with the prompt, as A2D's published loop has them by padding: its tokens, whatever else differs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.errors import ConfigError
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from losa_runtime.sparse.method import METHODS, method_class
from tests.engine.faults import install
from tests.engine.padded_loop import PaddedLoop
from tests.engine.recording import logits_of
from tests.kernels.platforms import INTERPRETED
from tests.sparse.cases import CASES

ARCHITECTURE = "A2DQwen3LMHeadModel"
Make = Callable[..., LLM]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    @cache
    def folder(block: int) -> Path:
        made = tmp_path_factory.mktemp(f"a2d{block}")
        write_random_checkpoint(made, architecture=ARCHITECTURE, seed=9, block_size=block)
        return made

    def engine(block: int = 8, **options: Any) -> LLM:
        settings = {"block_grid": "prompt-end", "page_size": block, "max_total_tokens": 1024, **options}
        return LLM(model=str(folder(block)), **settings)

    return engine


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(new: int, **custom: Any) -> SamplingParams:
    fixed = {"algorithm": "low_confidence_static", "denoising_steps": 3, **custom}
    return SamplingParams(temperature=0.0, max_new_tokens=new, custom_params=DiffusionParams(**fixed))


def loop_of(llm: LLM) -> PaddedLoop:
    about = llm.engine.parts.model_config
    return PaddedLoop(Path(llm.engine.parts.folder), about.block_length, about.mask_token_id, llm.tokenizer.vocab_size)


def expected(llm: LLM, asked: list[tuple[int, int]], steps: int = 3) -> list[list[int]]:
    loop, stop = loop_of(llm), tuple(llm.engine.parts.eos_token_ids)
    return [loop.generate(prompt(length, length), new, steps, stop) for length, new in asked]


ASKED = [(1, 20), (7, 9), (8, 17), (9, 8), (15, 30), (16, 1), (27, 25), (45, 13), (64, 11), (83, 40)]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(("block", "page"), [(8, 8), (8, 16), (8, 4), (4, 16), (32, 16), (16, 16)])
def test_tokens_equal_the_padded_loop(make: Make, backend: str, block: int, page: int) -> None:
    """All at once: prompts on the grid and off it, one after the other and together."""
    llm = make(block, page_size=page, attention_backend=backend, chunked_prefill_size=64)
    got = llm.generate([prompt(n, n) for n, _ in ASKED], [greedy(new) for _, new in ASKED])
    assert [list(answer.token_ids) for answer in got] == expected(llm, ASKED)
    [alone] = llm.generate([prompt(27, 27)], greedy(25))
    assert alone.token_ids == got[6].token_ids
    assert alone.cached_tokens == 0, "nothing is shared"
    cache_ = llm.engine.parts.cache
    cache_.check()
    assert cache_.owned_pages == cache_.tree.cached_pages == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_all_of_the_budget(make: Make, method: str) -> None:
    llm = make(8, page_size=16)
    asks: dict[str, Any] = {"sparse_method": method, "sparse_options": CASES[method].full}
    if method_class(method).has_budget:
        asks["token_budget"] = 256
    if method_class(method).has_active_rows:
        asks["active_tokens"] = 8
    got = llm.generate([prompt(n, n) for n, _ in ASKED], [greedy(new, **asks) for _, new in ASKED])
    assert [list(answer.token_ids) for answer in got] == expected(llm, ASKED)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_does_without_the_rest_and_minds_no_company(make: Make, method: str) -> None:
    wish: dict[str, Any] = {"token_budget": 16} if method_class(method).has_budget else {}
    params = greedy(19, sparse_method=method, **wish)
    llm = make(8, page_size=16, debug_poison_pages=True)
    prompts = [prompt(n, n) for n in (43, 64, 77, 121)]
    alone = [llm.generate([ids], params)[0] for ids in prompts]
    together = llm.generate(prompts, params)
    assert [a.token_ids for a in alone] == [t.token_ids for t in together]
    for one, other in zip(alone, together, strict=True):
        assert one.stats.kv_density == pytest.approx(other.stats.kv_density)
        assert 0.0 <= (one.stats.kv_density or 0.0) <= 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"chunked_prefill_size": 8},
        {"disable_fused_commit": True, "chunked_prefill_size": 24},
        {"max_running_requests": 2},
        {"overlap_schedule": "on"},
        {"deterministic": True},
    ],
    ids=str,
)
def test_cuts_company_and_retraction_change_nothing(make: Make, options: dict[str, Any]) -> None:
    llm = make(8, **options)
    got = llm.generate([prompt(n, n) for n, _ in ASKED], [greedy(new) for _, new in ASKED])
    assert [list(answer.token_ids) for answer in got] == expected(llm, ASKED)


@pytest.mark.parametrize("page", [4, 8, 16])
def test_retraction_changes_nothing(make: Make, page: int) -> None:
    llm, asked = make(8, page_size=page, max_total_tokens=112), [(9, 60), (13, 60), (20, 60), (16, 60)]
    got = llm.generate([prompt(n, n) for n, _ in asked], [greedy(new) for _, new in asked])
    assert [list(answer.token_ids) for answer in got] == expected(llm, asked)
    assert sum(g.stats.retractions for g in got) > 0
    llm.engine.parts.cache.check()
    assert llm.engine.parts.cache.owned_pages == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", INTERPRETED)
@pytest.mark.parametrize(("block", "page"), [(8, 16), (32, 16)])
def test_tokens_equal_the_padded_loop_with_tritons_kernels(make: Make, backend: str, block: int, page: int) -> None:
    llm, asked = make(block, page_size=page, attention_backend=backend), [(1, 9), (13, 11), (45, 20)]
    losa = {"sparse_method": "losa", "active_tokens": block}
    got = llm.generate([prompt(n, n) for n, _ in asked], [greedy(new, **losa) for _, new in asked])
    assert [list(answer.token_ids) for answer in got] == expected(llm, asked)


@pytest.mark.parametrize("method", ["dense", "losa"])
def test_logits_are_the_same_bits(make: Make, method: str) -> None:
    """In deterministic mode, alone and in company, however prompts are cut."""
    custom = DiffusionParams(sparse_method=method, token_budget=16 if method == "losa" else None)
    asked = []
    for n in (5, 16, 43, 77):
        params = SamplingParams(temperature=0.7, sampling_seed=n, max_new_tokens=21, custom_params=custom)
        asked.append((prompt(n, n), params))
    alone, _ = logits_of(make(8, deterministic=True, max_running_requests=1, disable_fused_commit=True), asked)
    together, _ = logits_of(make(8, deterministic=True, chunked_prefill_size=24), asked)
    assert alone.keys() == together.keys()
    assert all(torch.equal(logits, together[row]) for row, logits in alone.items())


def test_a_fault_changes_nothing(make: Make) -> None:
    llm = make(8)
    model, calls = llm.engine.parts.runner.model, iter(range(1000))
    install(llm.engine, lambda tokens_T, layer: layer == 1 and next(calls) == 5)
    got = llm.generate([prompt(n, n) for n in (27, 45)], greedy(25))
    llm.engine.parts.runner.model = model
    assert llm.engine.undone >= 1
    assert [list(answer.token_ids) for answer in got] == expected(llm, [(27, 25), (45, 25)])


@pytest.mark.parametrize("length", [1, 5, 8, 13, 27])
def test_scores(make: Make, length: int) -> None:
    llm = make(8, page_size=16)
    [got] = llm.score([prompt(length, length)], start=0)
    assert got == pytest.approx(loop_of(llm).scores(prompt(length, length)), abs=1e-4)


def test_the_grid_matters(make: Make) -> None:
    """Where a prompt is whole blocks the grids are one; else they are not."""
    here, there = make(8), make(8, block_grid="start")
    for length, same in ((16, True), (13, False)):
        scores = [llm.score([prompt(length, 1)])[0] for llm in (here, there)]
        assert (scores[0] == pytest.approx(scores[1], abs=1e-4)) == same


def test_a_last_block_fits_into_the_context(make: Make) -> None:
    llm = make(8, max_total_tokens=4096)
    context = llm.engine.parts.context_length
    assert context == make(8, block_grid="start").engine.parts.context_length - 8
    [got] = llm.generate([prompt(context - 5, 1)], greedy(5))
    assert len(got.token_ids) == 5 or got.finish.type == "stop"


def test_other_families_refuse_it(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"block_grid: found 'prompt-end', allowed: start \(models of SDAR"):
        LLM(model=str(tiny_checkpoint), block_grid="prompt-end")


def test_it_is_off_by_default(make: Make) -> None:
    llm = LLM(model=make(8).engine.parts.folder, page_size=8, max_total_tokens=512)
    info = llm.engine.info()
    assert (info["block_grid"], info["radix_cache"]) == ("start", True)
    assert make(8).engine.info()["radix_cache"] is False

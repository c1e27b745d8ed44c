"""Blocks behind short prefixes attend densely where the engine is told so, and it can find out itself from where."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.errors import ConfigError
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.least_prefix import LeastPrefix
from losa_runtime.sparse.min_context import Line, MethodCosts, MinContext

SMALL: dict[str, Any] = {"max_total_tokens": 2048, "sparse_method": "losa", "token_budget": 16}


def greedy(new: int = 40, **custom: Any) -> SamplingParams:
    wish = {"algorithm": "low_confidence_static", "denoising_steps": 16, **custom}
    return SamplingParams(temperature=0.0, max_new_tokens=new, ignore_eos=True, custom_params=DiffusionParams(**wish))


def test_short_prefixes_are_attended_densely_and_long_ones_not(tiny_checkpoint: Path) -> None:
    prompt = [*range(10, 106)]  # six whole blocks
    always, never, later = (LLM(model=str(tiny_checkpoint), **SMALL, sparse_min_context=n) for n in (0, 4000, 112))
    [mine] = always.generate([prompt], greedy())
    assert mine.stats.dense_steps == 3, "the first step of each of three blocks"
    [mine] = never.generate([prompt], greedy())
    [dense] = always.generate([prompt], greedy(sparse_method="dense"))
    assert mine.token_ids == dense.token_ids and mine.stats.dense_steps == mine.stats.denoise_steps
    [mine] = later.generate([prompt], greedy())
    assert mine.stats.dense_steps == 16 + 2, "the first block whole, of the others the first step"
    assert mine.token_ids[:16] == dense.token_ids[:16]


def test_a_number_is_told_and_refused(tiny_checkpoint: Path) -> None:
    info = LLM(model=str(tiny_checkpoint), **SMALL, sparse_min_context="512").engine.info()
    assert info["sparse_min_context"] == 512
    assert info["sparse_from"]["losa"] == 512 and info["sparse_from"]["dense"] == 0  # type: ignore[index]
    for wrong in (-1, "some", 1.5, True, None, "1e3"):
        with pytest.raises(ConfigError, match=r"sparse_min_context: found .*a number of tokens from 0, or auto"):
            LLM(model=str(tiny_checkpoint), **SMALL, sparse_min_context=wrong)
    with pytest.raises(ConfigError, match=r"sparse_min_context: found 512, allowed: 0, as .* lacks 'dense'"):
        LLM(model=str(tiny_checkpoint), **SMALL, sparse_min_context=512, sparse_methods=("losa",))
    alone = LLM(model=str(tiny_checkpoint), **SMALL, sparse_methods=("losa",))
    assert alone.engine.info()["sparse_from"] == {"losa": 0}


@pytest.mark.parametrize("offered", [("dense", "losa", "flashblock"), pytest.param(None, marks=pytest.mark.slow)])
def test_auto_measures_every_offered_method(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture, offered: tuple[str, ...] | None
) -> None:
    options = {**SMALL, "sparse_methods": offered}
    with caplog.at_level(logging.INFO):
        llm = LLM(model=str(tiny_checkpoint), **options, sparse_min_context="auto", debug_poison_pages=True)
    parts = llm.engine.parts
    rule = parts.least_prefix.rule
    assert rule.tokens is None and rule.dense.base > 0
    assert set(rule.methods) == set(parts.runner.methods) - {"dense"}
    for name, costs in rule.methods.items():
        assert costs.first.base + costs.first.slope > 0 and costs.later.base + costs.later.slope > 0, name
        assert (costs.budget > 0) == parts.runner.methods[name].has_budget
        assert (costs.rows > 0) == (name == "losa") and costs.per_row >= 0
    assert "sparse_min_context auto: " in caplog.text and "measured in" in caplog.text
    assert llm.engine.info()["sparse_min_context"] == "auto"
    assert set(llm.engine.info()["sparse_from"]) == set(parts.runner.methods)  # type: ignore[call-overload]
    # What was measured leaves nothing behind: pages are free, and poisoned like all free pages.
    assert parts.cache.pool.free == parts.cache.pool.num_pages
    assert parts.runner.backend.pool.k(0).isnan().all()
    for method in parts.runner.methods:
        [mine] = llm.generate([[*range(10, 200)]], greedy(new=20, sparse_method=method))
        assert mine.finish.type == "length"


def test_the_rule_counts_two_steps_where_a_threshold_may_end_a_block(tiny_checkpoint: Path) -> None:
    llm = LLM(model=str(tiny_checkpoint), **SMALL)
    dense = Line(1e-3, 1e-6)
    rule = MinContext(None, 16, dense, {"losa": MethodCosts(dense, Line(1.5e-3, 0.0), 16, 0.0)})
    parts = llm.engine.parts
    llm.engine.parts = parts._replace(least_prefix=LeastPrefix(rule, parts.least_prefix.dense))
    found = {}
    for algorithm in ("low_confidence_static", "low_confidence_dynamic"):
        custom = DiffusionParams(algorithm=algorithm, denoising_steps=16)
        found[algorithm] = llm.engine.parts.least_prefix.of(
            *(settle(custom, llm.engine.config) for settle in _settlers(llm))
        )
    assert 0 < found["low_confidence_static"] < found["low_confidence_dynamic"]


def _settlers(llm: LLM) -> Any:
    from losa_runtime.decoding.registry import resolve as resolve_decoding
    from losa_runtime.sparse.resolve import resolve as resolve_sparse

    geometry = llm.engine.parts.geometry
    return (
        lambda custom, config: resolve_sparse(custom, config, geometry),
        lambda custom, config: resolve_decoding(custom, config, geometry.block_length),
    )


def test_too_few_pages_to_measure_with_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"sparse_min_context: found 'auto', allowed: a number, .* only 128 tokens"):
        LLM(model=str(tiny_checkpoint), **SMALL | {"max_total_tokens": 128}, sparse_min_context="auto")

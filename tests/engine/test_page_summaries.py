"""What pages keep beside K/V is said at start, and what merely helps a method changes costs but no answer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.request import RequestStats
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.method import METHODS
from tests.engine.test_exact import prompt

WANT = "'ba_att' reads keys for want of key_moments (6.2% of the memory of K/V; sparse_methods keeps it by name)"


def answered(checkpoint: Path, backend: str, **options: Any) -> tuple[list[int], RequestStats, LLM]:
    llm = LLM(model=str(checkpoint), attention_backend=backend, max_total_tokens=1024, **options)
    custom = DiffusionParams(
        sparse_method="ba_att",
        sparse_options={"block_size": 16, "sort": False, "variance_layers": "all"},
        token_budget=32,
        algorithm="low_confidence_static",
        denoising_steps=4,
    )
    [output] = llm.generate(
        [prompt(150, seed=1)], SamplingParams(temperature=0, max_new_tokens=48, ignore_eos=True, custom_params=custom)
    )
    return output.token_ids, output.stats, llm


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_moments_are_kept_by_name_and_only_make_it_cheaper(
    tiny_b4_checkpoint: Path, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In blocks of 4: pages fill over several commits."""
    with caplog.at_level(logging.INFO):
        tokens, stats, llm = answered(tiny_b4_checkpoint, backend)
    assert "page summaries: key_bounds\n" in caplog.text and WANT in caplog.text
    assert llm.engine.info()["page_summaries"] == ["key_bounds"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        same, cheaper, kept = answered(tiny_b4_checkpoint, backend, sparse_methods=tuple(METHODS))
    assert "page summaries: key_bounds, key_moments\n" in caplog.text and "for want of" not in caplog.text
    assert kept.engine.info()["page_summaries"] == ["key_bounds", "key_moments"]
    assert same == tokens and stats.kv_bytes == cheaper.kv_bytes
    assert 0 < cheaper.metadata_bytes < stats.metadata_bytes
    per_token = [one.engine.info()["kv_pool_bytes"] for one in (kept, llm)]
    assert per_token[0] / per_token[1] == (16 + 1 + 1) / (16 + 1)  # vectors of K, V and summaries, by two

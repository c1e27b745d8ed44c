"""The `losa` command: options become a configuration, mistakes become one line."""

from __future__ import annotations

import argparse

import pytest

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import ConfigError
from losa_server.cli import main as losa
from losa_server.cli import make_parser
from losa_server.commands.engine_flags import config_from


def parse(*words: str) -> argparse.Namespace:
    return make_parser()[0].parse_args(["serve", "--model-path", "m", *words])


def test_absent_options_keep_the_defaults() -> None:
    assert config_from(parse()) == EngineConfig(model="m")


OPTIONS = """
--tokenizer-path t --dtype bfloat16 --kv-cache-dtype float16 --context-length 512 --mem-fraction-static 0.3
--max-running-requests 4 --max-total-tokens 4096 --page-size 32 --chunked-prefill-size 64 --random-seed 7
--disable-radix-cache --attention-backend torch --device cpu --sparse-method losa --token-budget 256
--active-ratio 0.5 --algorithm low_confidence_static --threshold 0.8 --denoising-steps 4 --block-length 8
--mask-token-id 3 --max-queued-requests 9 --schedule-policy lpm --radix-eviction-policy lfu
"""


def test_every_option_arrives() -> None:
    config = config_from(parse(*OPTIONS.split(), "--rope-scaling", '{"rope_type": "yarn", "factor": 2.0}'))
    assert config == EngineConfig.parse(
        model="m", tokenizer="t", dtype="bfloat16", kv_cache_dtype="float16", context_length=512, mem_fraction=0.3,
        max_running_requests=4, max_total_tokens=4096, page_size=32, chunked_prefill_size=64, random_seed=7,
        disable_radix_cache=True, attention_backend="torch", device="cpu", sparse_method="losa", token_budget=256,
        active_ratio=0.5, algorithm="low_confidence_static", threshold=0.8, denoising_steps=4, block_length=8,
        mask_token_id=3, max_queued_requests=9, schedule_policy="lpm", radix_eviction_policy="lfu",
        rope_scaling={"kind": "yarn", "factor": 2.0},
    )  # fmt: skip


def test_every_engine_setting_has_an_option() -> None:
    options = set(vars(parse())) | {action.dest for action in make_parser()[1]["serve"]._actions}
    assert set(EngineConfig.model_fields) - {"show_progress"} <= options


def test_a_value_out_of_range_names_the_option() -> None:
    with pytest.raises(ConfigError, match="page_size"):
        config_from(parse("--page-size", "0"))


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["serve", "--model", "m", "--max-model-len", "5"], "--context-length"),
        (["serve", "--model", "m", "--tokn-budget", "5"], "did you mean --token-budget"),
        (["serve", "--model", "m", "--rope-scaling", "{"], "not JSON"),
        (["serve"], "--model-path"),
        (["serve", "--model", "m", "--active-tokens", "1", "--active-ratio", "0.5"], "not allowed with"),
    ],
)
def test_mistakes_are_explained(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        losa(words)
    assert caught.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "generate", "make-checkpoint"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        losa([command, "--help"])
    assert caught.value.code == 0
    assert "usage: losa" in capsys.readouterr().out

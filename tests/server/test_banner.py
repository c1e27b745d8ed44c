"""What is shown at start: every fact that the engine tells, and requests that can be copied."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from losa_runtime.decoding.registry import settings_read
from losa_server.banner import show_ready, show_start

FACTS = {
    "version": "9.9", "model_path": "/models/[odd] name", "architecture": "SDARForCausalLM", "parameters": 3_200_256,
    "weight_bytes": 2**23, "dtype": "bfloat16", "context_length": 32768, "block_length": 16, "device": "cpu",
    "attention_backend": "NativeBackend", "attention_detail": "avx512", "threads": 7, "max_total_tokens": 65536,
    "page_size": 16, "kv_cache_dtype": "float16", "kv_pool_bytes": 2**26, "sparse_state_bytes": 2**25,
    "max_running_requests": 31, "max_queued_requests": 1023, "chunked_prefill_size": 2048, "schedule_policy": "lpm",
    "radix_cache": False, "sparse_method": "losa", "token_budget": 512, "sparse_methods": ["dense", "losa"],
    "algorithm": "low_confidence_dynamic", "threshold": 0.75, "denoising_steps": 8, "entropy_bound": 0.1,
    "algorithm_reads": ["denoising_steps", "sub_block_length", "threshold"],
}  # fmt: skip


def shown(show: object, *args: object, **options: object) -> str:
    screen = io.StringIO()
    assert callable(show)
    show(Console(file=screen, width=160), *args, **options)
    return screen.getvalue()


def test_the_table_tells_everything() -> None:
    text = shown(show_start, FACTS, 1.25)
    for part in (
        "9.9: loaded in 1.2 s", "/models/[odd] name", "SDARForCausalLM, 3.2 M parameters, bfloat16, 8.0 MiB",
        "context 32,768, blocks of 16", "cpu, NativeBackend avx512, threads: 7",
        "65,536 tokens, pages of 16, float16, 64.0 MiB, and 32.0 MiB for the states of methods",
        "31 running, 1,023 waiting, 2,048 prompt tokens per round, lpm, prefix cache off", "losa, budget 512 tokens",
        "dense, losa", "low_confidence_dynamic, threshold 0.75, 8 planned steps per block",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("rule", "least", "words"),
    [
        ("auto", 1536, "losa, budget 512 tokens, dense below 1,536 tokens of context (measured)"),
        ("auto", None, "losa, budget 512 tokens, but dense up to the longest context (measured)"),
        (4096, 4096, "losa, budget 512 tokens, dense below 4,096 tokens of context"),
    ],
)
def test_from_which_context_on_the_method_is_used(rule: object, least: int | None, words: str) -> None:
    facts = {**FACTS, "sparse_min_context": rule, "sparse_from": {"dense": 0, "losa": least}}
    assert words in shown(show_start, facts, 1.0)
    assert "dense below" not in shown(show_start, {**facts, "sparse_min_context": 0}, 1.0)


def test_only_what_the_algorithm_reads_is_shown() -> None:
    for algorithm, words in (
        ("low_confidence_static", "low_confidence_static, 8 planned steps per block, sub-blocks of 4"),
        ("entropy_bounded", "entropy_bounded, up to 0.1 nats at once, 8 planned steps per block, sub-blocks of 4"),
        ("joint_threshold", "joint_threshold, threshold 0.75, edits above 0.9"),
    ):
        more = {"edit_threshold": 0.9, "sub_block_length": 4, "algorithm_reads": settings_read(algorithm)}
        [line] = [line for line in shown(show_start, {**FACTS, **more, "algorithm": algorithm}, 1.0).splitlines()
                  if algorithm in line]  # fmt: skip
        assert words in line and ("threshold 0.75" in line) == (algorithm == "joint_threshold")


def test_quantized_weights_are_shown_beside_what_they_were() -> None:
    facts = {**FACTS, "quantization": "int8", "weight_bytes_unquantized": 2**25}
    words = "bfloat16, linear layers in int8, 8.0 MiB, unquantized 32.0 MiB"
    assert words in shown(show_start, facts, 1.0)
    assert "unquantized" not in shown(show_start, {**facts, "quantization": None}, 1.0)


def test_unknown_facts_are_left_out() -> None:
    text = shown(show_start, {"model_path": "m", "sparse_method": "dense"}, 0.0)
    assert "dense (a request may choose another" in text
    assert "None" not in text
    assert "batching" not in text


@pytest.mark.parametrize("with_key", [False, True])
def test_the_first_request_can_be_copied(with_key: bool) -> None:
    text = shown(show_ready, "http://127.0.0.1:1", with_key=with_key)
    assert "curl -s http://127.0.0.1:1/generate" in text
    assert 'sgl.RuntimeEndpoint("http://127.0.0.1:1"' in text
    assert ("Authorization: Bearer $LOSA_API_KEY" in text) is with_key
    assert ('api_key=os.environ["LOSA_API_KEY"]' in text) is with_key

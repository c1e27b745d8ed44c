"""What Prometheus gets: right numbers under the promised names, from the last report, without waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from losa_server.answer import Answer
from losa_server.metrics import Metrics
from tests.server.app_server import AppServer
from tests.server.test_leaving import until

NAMES = {
    "sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage", "sglang:cache_hit_rate",
    "sglang:gen_throughput", "sglang:num_used_tokens", "sglang:max_total_num_tokens", "sglang:prompt_tokens_total",
    "sglang:generation_tokens_total", "sglang:cached_tokens_total", "sglang:num_requests_total",
    "sglang:num_aborted_requests_total", "sglang:num_retracted_reqs", "sglang:num_retracted_requests_total",
    "sglang:evicted_tokens_total", "sglang:time_to_first_token_seconds_count",
    "sglang:inter_token_latency_seconds_count", "sglang:e2e_request_latency_seconds_count",
    "sglang:queue_time_seconds_count", "losa:denoise_steps_per_block_count", "losa:tokens_per_forward_count",
    "losa:active_share_count", "losa:kv_density_count", "losa:kv_pages_loaded_total", "losa:kv_pages_skipped_total",
    "losa:rows_total", "losa:forwards_total", "losa:evicted_pages_total", "losa:engine_up",
    "losa:engine_report_age_seconds", "losa:num_failed_requests_total", "losa:http_responses_total",
    "losa:denoise_steps_total", "losa:live_requests", "losa:malformed_messages_total", "losa:grammar_bytes",
}  # fmt: skip


@pytest.fixture
def fresh(bundled: str) -> Iterator[AppServer]:
    with AppServer(bundled, served_model_name='the "model"') as running:
        assert until(lambda: running.client.reported_at is not None)
        yield running


def scrape(server: AppServer) -> dict[tuple[str, str], float]:
    """(name, value of the second label) -> value."""
    reply = httpx.get(f"{server.url}/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    values: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == 'the "model"'
            labels.pop("le", None)
            values[sample.name, "".join(labels.values())] = sample.value
    return values


def generate(server: AppServer, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/generate", json={"text": "the red fox", **body}, timeout=20)


def test_counts_are_right(fresh: AppServer) -> None:
    before = scrape(fresh)
    assert before["sglang:num_requests_total", ""] == 0
    prompt = generate(fresh, sampling_params={"max_new_tokens": 9}).json()["meta_info"]["prompt_tokens"]
    generate(fresh, text=["the red fox"] * 2, sampling_params={"max_new_tokens": 4})
    assert generate(fresh, text="REFUSE").status_code == 500
    assert generate(fresh, text="").status_code == 400
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{fresh.url}/generate", json={"text": "HANG"}, timeout=httpx.Timeout(5, read=0.2))
    assert until(lambda: fresh.engine.aborted == 1)
    assert until(lambda: scrape(fresh)["sglang:num_aborted_requests_total", ""] == 1)
    after = scrape(fresh)
    assert {name for name, _ in after} >= NAMES
    assert after["sglang:num_requests_total", ""] == 6
    assert after["losa:num_failed_requests_total", ""] == 1
    assert after["sglang:generation_tokens_total", ""] == 9 + 2 * 4
    assert after["sglang:prompt_tokens_total", ""] == 3 * prompt
    assert after["sglang:time_to_first_token_seconds_count", ""] == 3
    assert after["sglang:inter_token_latency_seconds_count", ""] in (0, 1, 5)  # news that come together are one piece
    assert after["sglang:e2e_request_latency_seconds_count", ""] == 3
    assert after["losa:tokens_per_forward_sum", ""] == 9 / 3 + 4 + 4
    assert after["losa:kv_density_sum", ""] == 3 * 0.25
    assert after["losa:http_responses_total", "400"] == 1
    assert after["losa:http_responses_total", "500"] == 1
    assert after["losa:http_responses_total", "499"] == 1


def test_time_between_tokens_is_counted_per_token(fresh: AppServer) -> None:
    metrics = Metrics(fresh.manager, "m")
    generation: Any = SimpleNamespace(answer=Answer(), first_s=0.5)
    for tokens, gap_s in ((4, 0.5), (0, 0.3), (4, 0.2), (1, 0.07)):
        generation.answer.completion_tokens += tokens
        metrics.advanced(generation, tokens, gap_s)
    text = metrics.text().decode()
    assert 'sglang:inter_token_latency_seconds_count{model_name="m"} 5.0' in text
    assert f'sglang:inter_token_latency_seconds_sum{{model_name="m"}} {0.05 * 4 + 0.07}' in text
    assert 'sglang:time_to_first_token_seconds_sum{model_name="m"} 0.5' in text
    assert 'sglang:generation_tokens_total{model_name="m"} 9.0' in text


def test_the_engines_word_is_passed_on(fresh: AppServer) -> None:
    generate(fresh, sampling_params={"max_new_tokens": 4})
    assert until(lambda: scrape(fresh)["losa:forwards_total", ""] == 5)
    values = scrape(fresh)
    assert values["sglang:max_total_num_tokens", ""] == 65536
    assert values["sglang:num_used_tokens", ""] == (4096 - 4000 - 64) * 16
    assert values["sglang:token_usage", ""] == (4096 - 4000 - 64) / 4096
    assert values["sglang:num_retracted_requests_total", ""] == 3
    assert values["sglang:evicted_tokens_total", ""] == 7 * 16
    assert values["losa:rows_total", "commit"] == 16
    assert values["losa:busy_seconds_total", ""] > 0
    assert values["losa:engine_resident_memory_bytes", ""] > 2**20
    assert values["losa:kv_pages_loaded_total", ""] == 20
    assert values["losa:kv_pages_skipped_total", ""] == 60
    assert values["losa:engine_up", ""] == 1
    assert values["losa:engine_restarts_total", ""] == 0
    assert (values["losa:malformed_messages_total", "server"], values["losa:malformed_messages_total", "engine"]) == (
        0,
        0,
    )


def test_a_scrape_does_not_wait_for_a_step(fresh: AppServer) -> None:
    worker = threading.Thread(target=lambda: generate(fresh, text="GATE", sampling_params={"max_new_tokens": 1}))
    worker.start()
    try:
        assert until(lambda: fresh.engine.waits_at_gate)
        assert scrape(fresh)["losa:live_requests", ""] == 1
    finally:
        fresh.engine.gate.set()
        worker.join(10)
    assert until(lambda: scrape(fresh)["losa:live_requests", ""] == 0)


def test_nothing_is_kept_in_the_global_registry(fresh: AppServer, bundled: str) -> None:
    generate(fresh, sampling_params={"max_new_tokens": 4})
    with AppServer(bundled, served_model_name='the "model"') as other:
        assert scrape(other)["sglang:num_requests_total", ""] == 0
    assert not [m.name for m in REGISTRY.collect() if m.name.startswith(("sglang:", "losa:"))]


def test_metrics_can_be_left_out(bundled: str) -> None:
    with AppServer(bundled, enable_metrics=False) as server:
        assert httpx.get(f"{server.url}/metrics").status_code == 404
        assert generate(server, sampling_params={"max_new_tokens": 4}).status_code == 200


def test_the_number_of_series_does_not_grow(fresh: AppServer) -> None:
    for i in range(30):
        generate(fresh, text=f"fox {i}", rid=f"r{i}", sampling_params={"max_new_tokens": 4})
        httpx.get(f"{fresh.url}/nowhere/{i}")
    text = httpx.get(f"{fresh.url}/metrics").text
    assert len(text.splitlines()) < 400
    assert "_created" not in text

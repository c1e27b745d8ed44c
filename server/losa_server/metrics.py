"""What Prometheus reads: requests as this process sees them, and the engine's counters as it last told them.

Names are SGLang's (`sglang:`) where the meaning is the same, else our own (`losa:`). A scrape reads what is there and
waits for nobody, not for a long forward either: `losa:engine_report_age_seconds` says how old the engine's word is.
Everything lives in a registry of its own, so that several servers in one process do not meet.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from losa_server.request_manager import Generation, RequestManager
from losa_server.visit import Visit

LABEL = "model_name"
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200)
BETWEEN_TOKENS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10)
WHOLE_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
QUEUE_S = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
PER_FORWARD = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """A Watcher of a request manager's generations, and the text for `/metrics`."""

    def __init__(self, manager: RequestManager, model_name: str) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, [LABEL], registry=registry).labels(model_name)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, [LABEL], buckets=buckets, registry=registry).labels(model_name)

        self._requests = counter("sglang:num_requests", "Requests that have ended, however")
        self._aborted = counter("sglang:num_aborted_requests", "Requests that were aborted, or left by their clients")
        self._failed = counter("losa:num_failed_requests", "Requests that ended with a fault of ours")
        self._prompt = counter("sglang:prompt_tokens", "Prompt tokens of ended requests")
        self._cached = counter("sglang:cached_tokens", "Those of them that came from the prefix cache")
        self._generated = counter("sglang:generation_tokens", "Generated tokens")
        self._blocks = counter("losa:blocks", "Generated blocks of ended requests")
        self._first = histogram("sglang:time_to_first_token_seconds", "Until the first block of tokens", FIRST_TOKEN_S)
        self._between = histogram(
            "sglang:inter_token_latency_seconds",
            "Time between two pieces of news divided by the tokens of the later one, counted once per token",
            BETWEEN_TOKENS_S,
        )
        self._whole = histogram("sglang:e2e_request_latency_seconds", "From a request's start to its end", WHOLE_S)
        self._queue = histogram("sglang:queue_time_seconds", "From a request's arrival until it first ran", QUEUE_S)
        self._steps = histogram("losa:denoise_steps_per_block", "Mean over the blocks of a request", STEPS)
        self._per_forward = histogram("losa:tokens_per_forward", "Generated tokens per forward pass", PER_FORWARD)
        self._active = histogram("losa:active_share", "Share of block rows recomputed in later steps", SHARES)
        self._density = histogram("losa:kv_density", "Share of the prefix read in later steps, per K/V head", SHARES)
        self._replies = Counter("losa:http_responses", "HTTP answers", [LABEL, "code"], registry=registry)
        self._model_name = model_name
        registry.register(EngineCollector(manager, model_name))

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(_WithoutCreated(self._registry))

    def answered(self, _visit: Visit, _method: str, _path: str, status_code: int) -> None:
        """Count an HTTP answer."""
        self._replies.labels(self._model_name, str(status_code)).inc()

    def advanced(self, generation: Generation, tokens: int, gap_s: float) -> None:
        """Count new tokens and the time they took."""
        if not tokens:
            return
        self._generated.inc(tokens)
        if generation.answer.completion_tokens == tokens:
            self._first.observe(generation.first_s or gap_s)
            return
        for _ in range(tokens):
            self._between.observe(gap_s / tokens)

    def closed(self, generation: Generation) -> None:
        """Count an ended request."""
        answer, outcome = generation.answer, generation.outcome
        stats = answer.stats
        self._requests.inc()
        self._prompt.inc(answer.prompt_tokens)
        self._cached.inc(answer.cached_tokens)
        self._blocks.inc(stats.blocks)
        if outcome in ("abort", "left"):
            self._aborted.inc()
        elif outcome == "error":
            self._failed.inc()
        if stats.queued_s is not None:
            self._queue.observe(stats.queued_s)
        if generation.seconds is None:
            return
        self._whole.observe(generation.seconds)
        if stats.blocks:
            self._steps.observe(stats.denoise_steps / stats.blocks)
        if stats.forwards and answer.completion_tokens:
            self._per_forward.observe(answer.completion_tokens / stats.forwards)
        if stats.active_share is not None:
            self._active.observe(stats.active_share)
        if stats.kv_density is not None:
            self._density.observe(stats.kv_density)


class _WithoutCreated(CollectorRegistry):
    """Another registry's metrics without the times of their creation, which nearly double their number."""

    def __init__(self, inner: CollectorRegistry) -> None:
        super().__init__()
        self._inner = inner

    def collect(self) -> Iterator[Metric]:
        """As the other's."""
        for metric in self._inner.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


# name -> (key of the engine's report, meaning)
GAUGES = {
    "sglang:num_running_reqs": ("running", "Running requests"),
    "sglang:num_queue_reqs": ("waiting", "Waiting requests"),
    "sglang:num_retracted_reqs": ("retracted", "Waiting requests that had run and gave way"),
    "sglang:gen_throughput": ("gen_throughput", "Generated tokens per second since the last report"),
    "sglang:cache_hit_rate": ("recent_hit_rate", "Share of prompt tokens found in the cache since the last report"),
    "losa:num_pages": ("pages_total", "K/V pages"),
    "losa:num_cached_pages": ("pages_cached", "K/V pages of the prefix cache"),
    "losa:engine_resident_memory_bytes": ("engine_rss_bytes", "Resident memory of the engine process"),
}
COUNTERS = {
    "sglang:num_retracted_requests": ("retractions", "Times that a running request gave way"),
    "losa:evicted_pages": ("pages_evicted", "Pages evicted from the prefix cache"),
    "losa:forwards": ("forwards", "Forward passes"),
    "losa:busy_seconds": ("busy_s", "Time in which the engine had requests at hand"),
    "losa:forward_seconds": ("forward_s", "Time of it in which a forward ran; the rest was the host's"),
    "losa:engine_cpu_seconds": ("cpu_s", "Processor time of the engine process"),
    "losa:undone_forwards": ("undone_forwards", "Forward passes that raised and were undone"),
    "losa:denoise_steps": ("denoise_steps", "Denoising steps"),
    "losa:kv_read_bytes": ("kv_bytes", "K/V read by denoising steps"),
    "losa:kv_dense_bytes": ("dense_bytes", "K/V that dense attention would have read in them"),
    "losa:kv_metadata_bytes": ("metadata_bytes", "Page summaries and keys read to choose K/V"),
}


class EngineCollector(Collector):
    """The engine's last report as metrics. What an engine does not report is absent, not 0."""

    def __init__(self, manager: RequestManager, model_name: str) -> None:
        self._manager, self._model_name = manager, model_name

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known when there is a report."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The metrics of this moment."""
        client = self._manager.client
        report, info = client.report, client.info
        yield self._gauge("losa:engine_up", "Whether there is a live engine", int(client.healthy))
        yield self._gauge("losa:live_requests", "Requests that a client waits for", self._manager.live)
        yield self._counter("losa:late_outputs", "News for nobody", client.unknown_outputs)
        yield self._counter("losa:engine_restarts", "Engines that had to be replaced", client.restarts)
        dropped = {"server": client.malformed_messages, "engine": report.get("malformed_messages", 0)}
        yield self._by("losa:malformed_messages", "Frames between the processes that were dropped", "at", dropped)
        held = {"server": self._manager.compiling.stats["pattern_bytes"], "engine": report.get("grammar_bytes", 0)}
        yield self._by("losa:grammar_bytes", "Remembered grammars", "at", held, GaugeMetricFamily)
        if client.reported_at is None:
            return
        yield self._gauge("losa:engine_report_age_seconds", "Age", time.monotonic() - client.reported_at)
        for name, (key, text) in GAUGES.items():
            if key in report:
                yield self._gauge(name, text, report[key])
        for name, (key, text) in COUNTERS.items():
            if key in report:
                yield self._counter(name, text, report[key])
        yield from self._rows(report)
        yield from self._pool(report, info)
        yield from self._pages_read(report, info)

    def _rows(self, report: dict[str, Any]) -> Iterable[Metric]:
        if "rows" in report:
            yield self._by("losa:rows", "Rows computed, by what they were for", "mode", report["rows"])

    def _pool(self, report: dict[str, Any], info: dict[str, Any]) -> Iterable[Metric]:
        """The page pool in tokens. Used: neither free nor evictable at once."""
        total, page_size = info.get("max_total_tokens"), info.get("page_size")
        needed = ("pages_total", "pages_free", "pages_evictable")
        if total is None or page_size is None or any(key not in report for key in needed):
            return
        pages, free, evictable = (report[key] for key in needed)
        used = pages - free - evictable
        yield self._gauge("sglang:max_total_num_tokens", "Size of the page pool in tokens", total)
        yield self._gauge("sglang:num_used_tokens", "Tokens of the pool that requests hold", used * page_size)
        yield self._gauge("sglang:token_usage", "Share of the pool that requests hold", used / pages)
        evicted = report.get("pages_evicted", 0) * page_size
        yield self._counter("sglang:evicted_tokens", "Tokens evicted from the prefix cache", evicted)

    def _pages_read(self, report: dict[str, Any], info: dict[str, Any]) -> Iterable[Metric]:
        """Whole pages' worth of K/V, over all layers and heads."""
        size = info.get("page_bytes")
        if size and "kv_bytes" in report and "dense_bytes" in report:
            read, skipped = report["kv_bytes"], report["dense_bytes"] - report["kv_bytes"]
            yield self._counter("losa:kv_pages_loaded", "Pages' worth of K/V read by denoising steps", read / size)
            yield self._counter("losa:kv_pages_skipped", "Pages' worth that they did not read", skipped / size)

    def _by(
        self,
        name: str,
        text: str,
        label: str,
        values: Mapping[str, float],
        kind: type[CounterMetricFamily | GaugeMetricFamily] = CounterMetricFamily,
    ) -> Metric:
        family = kind(name, text, labels=[LABEL, label])
        for value, count in values.items():
            family.add_metric([self._model_name, value], count)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=[LABEL])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=[LABEL])
        family.add_metric([self._model_name], value)
        return family

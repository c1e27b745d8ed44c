"""From records and the server's counters to figures. SGLang's key names where there is one; times in ms, rates per s.

An answer comes in blocks: `ttft` is the time to the first one, `block` the time from one to the next, `itl` that time
per token, `tpot` the mean time per token behind the first block. Means of shares are over the requests that have them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from losa_server.bench.calls import Record
from losa_server.bench.settings import BenchSettings

PERCENTILES = (50, 95, 99)
# Of the server, as far as it tells them.
_FACTS = ("model_path", "block_length", "threads", "sparse_method", "token_budget", "algorithm", "denoising_steps")


def result(
    settings: BenchSettings,
    records: Sequence[Record],
    duration: float,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> dict[str, Any]:
    """One flat JSON-able mapping. before, after: the server's facts at both ends of the measurement."""
    done = [record for record in records if record.completed]
    prompt = sum(record.meta.get("prompt_tokens", record.prompt_len) for record in done)
    output = sum(record.output_len for record in done)
    return {
        "backend": "sglang",
        "dataset_name": settings.workload,
        "request_rate": "inf" if math.isinf(settings.request_rate) else settings.request_rate,
        "burst_size": settings.burst_size,
        "max_concurrency": settings.concurrency,
        "random_input_len": settings.random_input_len,
        "random_output_len": settings.random_output_len,
        "random_range_ratio": settings.random_range_ratio,
        "prefix_len": settings.prefix_len,
        "prefix_groups": settings.prefix_groups,
        "turns": settings.turns,
        "abort_share": settings.abort_share,
        "request_methods": list(settings.request_methods),
        "custom_params": settings.custom_params,
        "seed": settings.seed,
        "duration": duration,
        "completed": len(done),
        "failed": sum(record.error is not None for record in records),
        "abandoned": sum(record.abandoned for record in records),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / duration,
        "input_throughput": prompt / duration,
        "output_throughput": output / duration,
        "total_throughput": (prompt + output) / duration,
        "concurrency": sum(record.seconds for record in done) / duration,
        **_times("e2e_latency", [record.seconds for record in done]),
        **_times("ttft", [record.pieces[0].at for record in done if record.pieces]),
        **_times("tpot", [value for record in done if (value := _per_token(record)) is not None]),
        **_times("itl", [gap / tokens for gap, tokens in _gaps(done) for _ in range(tokens)]),
        **_times("block", [gap for gap, _ in _gaps(done)]),
        **_service(settings, records, duration),
        **_costs(done),
        **_server_side(before, after, duration),
    }


def details(records: Sequence[Record]) -> dict[str, Any]:
    """Per request, in the order in which they were sent; times in seconds."""
    return {
        "input_lens": [record.prompt_len for record in records],
        "output_lens": [record.output_len for record in records],
        "latencies": [record.seconds for record in records],
        "ttfts": [record.pieces[0].at if record.pieces else None for record in records],
        "blocks": [[later.at - earlier.at for earlier, later in pairwise(record.pieces)] for record in records],
        "errors": [record.error or "" for record in records],
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest values; values: at least one."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def _times(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    keys = [f"mean_{name}_ms", f"median_{name}_ms", f"std_{name}_ms", *(f"p{p}_{name}_ms" for p in PERCENTILES)]
    if not seconds:
        return dict.fromkeys(keys)
    mean = sum(seconds) / len(seconds)
    spread = math.sqrt(sum((value - mean) ** 2 for value in seconds) / len(seconds))
    found = [mean, percentile(seconds, 50), spread, *(percentile(seconds, p) for p in PERCENTILES)]
    return {key: 1000 * value for key, value in zip(keys, found, strict=True)}


def is_good(settings: BenchSettings, record: Record) -> bool:
    """Whether a call was answered to the end within all limits given. What did not occur, a second block, kept its."""
    gaps = [later.at - earlier.at for earlier, later in pairwise(record.pieces)]
    seen = (
        (settings.slo_ttft_ms, record.pieces[0].at if record.pieces else 0.0),
        (settings.slo_block_ms, sum(gaps) / len(gaps) if gaps else 0.0),
        (settings.slo_e2e_ms, record.seconds),
    )
    return record.completed and all(limit is None or 1000 * value <= limit for limit, value in seen)


def _service(settings: BenchSettings, records: Sequence[Record], duration: float) -> dict[str, float | None]:
    """Good calls per second, and their share of those whose clients stayed; None without limits."""
    limits = {f"slo_{name}_ms": getattr(settings, f"slo_{name}_ms") for name in ("ttft", "block", "e2e")}
    if not any(limits.values()):
        return {**limits, "goodput": None, "good_share": None}
    good = sum(is_good(settings, record) for record in records)
    return {**limits, "goodput": good / duration, "good_share": _ratio(good, sum(not r.abandoned for r in records))}


def _per_token(record: Record) -> float | None:
    rest = sum(piece.tokens for piece in record.pieces[1:])
    return (record.pieces[-1].at - record.pieces[0].at) / rest if rest else None


def _gaps(records: Iterable[Record]) -> list[tuple[float, int]]:
    """Seconds from one piece to the next, with the tokens that the later one brought."""
    return [(b.at - a.at, b.tokens) for record in records for a, b in pairwise(record.pieces)]


def _costs(records: Sequence[Record]) -> dict[str, float | None]:
    def total(name: str) -> int:
        return sum(record.meta.get(name) or 0 for record in records)

    def mean(name: str) -> float | None:
        values = [record.meta[name] for record in records if record.meta.get(name) is not None]
        return sum(values) / len(values) if values else None

    return {
        "cache_hit_rate": _ratio(total("cached_tokens"), total("prompt_tokens")),
        "tokens_per_step": _ratio(total("completion_tokens"), total("denoise_steps")),
        "forwards_per_block": _ratio(total("forwards"), total("blocks")),
        "kv_density": mean("kv_density"),
        "active_share": mean("active_share"),
        "retractions": total("num_retractions"),
    }


def _server_side(before: Mapping[str, Any], after: Mapping[str, Any], duration: float) -> dict[str, Any]:
    """What the engine counted meanwhile; whoever else used the server is in it.

    engine_cores: processors that the engine had, on average; with less than it has threads, others took them away, or
    there was little to do.
    """

    first, last = ((info.get("internal_states") or [{}])[0] for info in (before, after))

    def grown(name: str) -> float:
        return (last.get(name) or 0) - (first.get(name) or 0)

    forward = _ratio(grown("forward_s"), grown("busy_s"))
    held = last.get("pages_total", 0) - last.get("pages_free", 0)
    return {
        "forwards": grown("forwards"),
        "tokens_per_forward": _ratio(grown("generated_tokens"), grown("forwards")),
        "host_share": None if forward is None else 1.0 - forward,
        "engine_cores": grown("cpu_s") / duration,
        "tokens_per_cpu_s": _ratio(grown("generated_tokens"), grown("cpu_s")),
        "kv_bytes_held": _ratio(held * after.get("kv_pool_bytes", 0), last.get("pages_total", 0)),
        "engine_rss_bytes": last.get("engine_rss_bytes"),
        "http_rss_bytes": last.get("http_rss_bytes"),
        "server_version": after.get("version"),
        **{name: after.get(name) for name in _FACTS},
    }


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None

"""One load test from its settings to its result: facts, warm-up, measurement, facts again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from losa_runtime.core.errors import ConfigError
from losa_server.bench.calls import Record
from losa_server.bench.catalogue import WORKLOADS
from losa_server.bench.client import Client
from losa_server.bench.measure import result
from losa_server.bench.pace import closed_loop, open_loop
from losa_server.bench.settings import BenchSettings
from losa_server.bench.source import Source, Tokens


async def measure(
    url: str,
    api_key: str | None,
    settings: BenchSettings,
    done: Callable[[], None],
    source: Source | None = None,
) -> tuple[dict[str, Any], list[Record]]:
    """The result and its records. done: called after each measured program. source: of the prompts, else random ids.

    Raises ServerUnreachable and ConfigError; a call that fails is part of the result.
    """
    async with Client(url, api_key, settings.timeout_s) as client:
        before = await client.info()
        workload = WORKLOADS[settings.workload](settings, source or tokens_of(before, settings))
        for number in range(settings.warmup_requests):
            await workload.program(-1 - number)(client)
        if settings.flush_cache:
            await client.flush_cache()
        client.records.clear()
        programs = [workload.program(number) for number in range(settings.num_prompts)]
        before = await client.info()
        started = time.monotonic()
        if math.isinf(settings.request_rate):
            await closed_loop(programs, client, settings.concurrency or len(programs), done)
        else:
            rng, limit = workload.rng("arrivals"), settings.concurrency
            await open_loop(programs, client, settings.request_rate, rng, limit, done, settings.burst_size)
        duration = time.monotonic() - started
        return result(settings, client.records, duration, before, await client.info()), client.records


def tokens_of(info: dict[str, Any], settings: BenchSettings) -> Tokens:
    """Ids for random prompts. Raises ConfigError if neither the server nor the settings say how many there are."""
    size = settings.vocab_size or info.get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError("vocab_size: the server does not say how many token ids it has; give --vocab-size")
    mask = info.get("mask_token_id")
    return Tokens(size, mask if isinstance(mask, int) else None)

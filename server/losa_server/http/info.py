"""Routes that tell: health, model and server facts. Each in all spellings that clients use."""

from __future__ import annotations

import asyncio
from typing import Any

import psutil
from fastapi import APIRouter, Request
from starlette.responses import Response

import losa_runtime
from losa_runtime.core.sampling_params import SamplingParams
from losa_server.errors import EngineUnavailable, RequestFailed
from losa_server.http.body import unless_disconnected
from losa_server.http.native_answer import WEIGHT_VERSION
from losa_server.http.openai.call import served_name
from losa_server.http.replies import json_reply
from losa_server.http.streaming import manager_of, visit_of
from losa_server.request_manager import Ask

router = APIRouter()

PROBE_TIMEOUT_S = 20.0
STATS_TIMEOUT_S = 30.0  # the engine answers between two steps, and a step may prefill a long prompt


@router.get("/ping")
async def ping() -> Response:
    """200 as long as this process answers, whatever the engine does."""
    return json_reply({"status": "ok"})


@router.get("/health")
@router.get("/ready")
async def health(request: Request) -> Response:
    """200 while there is a live engine, else 503. Never waits for it."""
    client = manager_of(request).client
    if not client.healthy:
        raise EngineUnavailable(client.unavailable_because)
    return json_reply({"status": "ok"})


@router.get("/health_generate")
async def health_generate(request: Request) -> Response:
    """200 when the engine has generated one token just now, else 503."""
    manager = manager_of(request)
    params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
    # A cache namespace of its own: probes leave the statistics of real prefixes alone.
    ask = Ask(prompt=tuple(manager.tokenizer.encode("health")), sampling=params, namespace="health")
    try:
        await unless_disconnected(
            request, asyncio.wait_for(manager.generate([ask], visit_of(request)), PROBE_TIMEOUT_S)
        )
    except TimeoutError:
        raise EngineUnavailable(f"the engine did not generate within {PROBE_TIMEOUT_S:g} s") from None
    except RequestFailed as error:
        raise EngineUnavailable(f"the engine could not generate: {error.message}") from None
    return json_reply({"status": "ok"})


@router.get("/get_model_info")
@router.get("/model_info")
async def model_info(request: Request) -> Response:
    """Facts about the model: `model_path`, `tokenizer_path`, `is_generation` and the engine's own."""
    manager = manager_of(request)
    return json_reply(
        {
            **manager.info,
            "served_model_name": served_name(manager),
            "architectures": [manager.info.get("architecture")],
            "is_generation": True,
            "weight_version": WEIGHT_VERSION,
        }
    )


@router.get("/get_server_info")
@router.get("/server_info")
@router.get("/get_server_args")
async def server_info(request: Request) -> Response:
    """Settings of both processes, facts and, in `internal_states`, the engine's counters (one element per engine)."""
    manager = manager_of(request)
    client = manager.client
    state: dict[str, Any] = {
        **await client.stats(STATS_TIMEOUT_S),
        "live_requests": manager.live,
        **manager.compiling.stats,
        "http_rss_bytes": psutil.Process().memory_info().rss,
        "malformed_messages": client.malformed_messages,
        "late_outputs": client.unknown_outputs,
    }
    return json_reply(
        {
            **manager.settings.model_dump(mode="json"),
            **manager.info,
            "served_model_name": served_name(manager),
            "tp_size": 1,
            "dp_size": 1,
            "version": losa_runtime.__version__,
            "status": "ready",
            "internal_states": [state],
        }
    )

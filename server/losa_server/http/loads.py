"""How busy the engine is, in the words that routers read when they choose a worker.

From the engine's last report (once a second), so that the answer waits for no forward; before the first one all is 0.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

import losa_runtime
from losa_server.http.replies import json_reply
from losa_server.http.streaming import manager_of
from losa_server.request_manager import RequestManager

router = APIRouter()


@router.get("/v1/loads")
async def loads(request: Request) -> Response:
    """One element per engine. Tokens are those of the page pool; waiting ones may yet be found in the cache."""
    now = datetime.now(UTC).isoformat()
    load = _load(manager_of(request))
    return json_reply({"timestamp": now, "version": losa_runtime.__version__, "dp_rank_count": 1, "loads": [load]})


@router.get("/get_load")
async def get_load(request: Request) -> Response:
    """The same, in the few words of older routers."""
    load = _load(manager_of(request))
    waiting = load["num_waiting_reqs"]
    short = {
        "dp_rank": 0,
        "num_reqs": load["num_running_reqs"] + waiting,
        "num_waiting_reqs": waiting,
        "num_tokens": load["num_used_tokens"] + load["num_waiting_uncached_tokens"],
    }
    return json_reply([short])


def _load(manager: RequestManager) -> dict[str, Any]:
    report, info = manager.client.report, manager.client.info
    pages, most = report.get("pages_total", 0), info.get("max_running_requests") or 0
    used = pages - report.get("pages_free", pages) - report.get("pages_evictable", 0)
    running, waiting = report.get("running", 0), report.get("waiting", 0)
    used_tokens, queued_tokens = used * info.get("page_size", 0), report.get("waiting_tokens", 0)
    return {
        "dp_rank": 0,
        "num_running_reqs": running,
        "num_waiting_reqs": waiting,
        "num_waiting_uncached_tokens": queued_tokens,
        "num_used_tokens": used_tokens,
        "num_total_tokens": used_tokens + queued_tokens,
        "max_total_num_tokens": info.get("max_total_tokens", 0),
        "token_usage": used / pages if pages else 0.0,
        "gen_throughput": report.get("gen_throughput", 0.0),
        "cache_hit_rate": report.get("recent_hit_rate", 0.0),
        "utilization": running / most if most else 0.0,
        "max_running_requests": most,
    }

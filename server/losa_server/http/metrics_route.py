"""GET /metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """All metrics in Prometheus's text format. Waits for nobody."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)

"""The model list: one model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from losa_server.http.openai.call import check_model, served_name
from losa_server.http.replies import json_reply
from losa_server.http.streaming import manager_of
from losa_server.request_manager import RequestManager

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The served model as a list."""
    return json_reply({"object": "list", "data": [_card(manager_of(request))]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """The served model, or 404."""
    check_model(manager_of(request), name)
    return json_reply(_card(manager_of(request)))


def _card(manager: RequestManager) -> dict[str, Any]:
    return {
        "id": served_name(manager),
        "object": "model",
        "created": manager.created,
        # Routers recognise the dialect of a worker by its owner.
        "owned_by": "sglang",
        "root": manager.info.get("model_path"),
        "max_model_len": manager.info.get("context_length"),
    }

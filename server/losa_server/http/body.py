"""Reading a request: its JSON body, and whether its client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import orjson
from starlette.requests import Request

from losa_runtime.core.errors import InvalidRequest
from losa_server.errors import ClientGone

T = TypeVar("T")


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in the body; an empty body is an empty object. Raises InvalidRequest (field `body`).

    The content type is not looked at: SGLang's client sends the JSON one even without a body.
    """
    raw = await request.body()
    if not raw.strip():
        return {}
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest("body", f"{len(raw)} bytes", f"valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InvalidRequest("body", type(value).__name__, "a JSON object")
    return value


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first. Raises ClientGone.

    A plain handler is not told that its client has left; without this it would run to its end for nobody. The body
    must have been read before.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""Reading a request: its JSON body, strictly, and whether its client is still there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

import orjson
from starlette.requests import Request

from losa_runtime.core.errors import InvalidRequest
from losa_server.errors import ClientGone

T = TypeVar("T")

MAX_DEPTH = 64  # of nested arrays and objects; what walks a body may be recursive
LARGE_BODY = 2**18  # bytes from which parsing leaves the event loop


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in the body; an empty body is an empty object. Raises InvalidRequest (field `body`).

    The content type is not looked at: SGLang's client sends the JSON one even without a body.
    """
    raw = await request.body()
    return parse_object(raw) if len(raw) < LARGE_BODY else await asyncio.to_thread(parse_object, raw)


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object without anything that two readers could understand differently. Raises InvalidRequest.

    Refused: keys that occur twice, NaN and infinities, numbers beyond a double, lone surrogates, bytes that are no
    UTF-8, and nesting deeper than MAX_DEPTH.
    """
    if not raw.strip():
        return {}
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest("body", f"{len(raw)} bytes", f"valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InvalidRequest("body", type(value).__name__, "a JSON object")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise InvalidRequest("body", "deeper nesting", f"JSON nested at most {MAX_DEPTH} levels deep")
    # Only a second reading shows keys that the first has overwritten; it costs little beside tokenizing.
    _TWICE.decode(raw.decode())
    return value


def _once(pairs: list[tuple[str, Any]]) -> None:
    names = {name for name, _ in pairs}
    if len(names) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidRequest("body", f"the key {twice!r} twice", "each key once in an object")


_TWICE = json.JSONDecoder(object_pairs_hook=_once)


def _deeper_than(value: Any, limit: int) -> bool:
    """Level by level, so that no nesting can exhaust the stack."""
    level = [value]
    for _ in range(limit):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True


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

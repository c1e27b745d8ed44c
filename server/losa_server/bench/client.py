"""Sends a call as a stream of events and notes when each piece came. Knows HTTP, not what the notes are for."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any, Self

import httpx
import orjson

from losa_runtime.core.errors import LosaError
from losa_server.bench.calls import Call, Record


class ServerUnreachable(LosaError):
    """There is no server at the address, or it does not answer as one."""


class Client:
    """Keeps the records of all its calls in the order in which they were made."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # What limits the number of connections is the pace.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(timeout_s, connect=30.0, pool=None)
        self.url, self.api_key = url, api_key
        self._http = httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=timeout, trust_env=False)
        self.records: list[Record] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self._http.aclose()

    async def info(self) -> dict[str, Any]:
        """The server's facts and counters. Raises ServerUnreachable."""
        answer = await self._ask("GET", "/server_info")
        if answer.status_code == 404:  # servers of before that name
            answer = await self._ask("GET", "/get_server_info")
        return dict(self._json(answer))

    async def flush_cache(self) -> None:
        """Forget cached prefixes. Raises ServerUnreachable."""
        answer = await self._ask("POST", "/flush_cache")
        if answer.status_code != 200:
            raise ServerUnreachable(f"flush_cache: {answer.status_code}: {answer.text[:500]}")

    async def call(self, call: Call) -> Record:
        """Make a call and read it to its end. What goes wrong stands in the record; only giving up is raised."""
        record = Record(len(call.prompt), call.max_new_tokens, time.monotonic())
        self.records.append(record)
        try:
            await self._stream(call, record)
        except httpx.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}".strip(": ")
        except asyncio.CancelledError:
            record.abandoned = True
            raise
        finally:
            record.seconds = time.monotonic() - record.started
        return record

    async def _stream(self, call: Call, record: Record) -> None:
        prompt = {"text": call.prompt} if isinstance(call.prompt, str) else {"input_ids": call.prompt}
        params = {**call.params, "max_new_tokens": call.max_new_tokens}
        body = orjson.dumps({**prompt, **call.body, "sampling_params": params, "stream": True})
        headers = {"Content-Type": "application/json"}
        async with self._http.stream("POST", "/generate", content=body, headers=headers) as reply:
            if reply.status_code != 200:
                record.error = f"{reply.status_code}: {_reason(await reply.aread())}"
                return
            if call.leave_after == 0:
                record.abandoned = True
                return
            async for line in reply.aiter_lines():
                if not line.startswith("data:") or record.error is not None:
                    continue
                if line == "data: [DONE]":
                    return
                record.hear(orjson.loads(line[5:]), time.monotonic() - record.started)
                if call.leave_after is not None and len(record.pieces) >= call.leave_after:
                    record.abandoned = record.error is None and not record.meta.get("finish_reason")
                    if record.abandoned:
                        return
        record.error = record.error or "the stream ended before the answer"

    async def _ask(self, method: str, path: str) -> httpx.Response:
        try:
            return await self._http.request(method, path)
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__}: {error}".strip(": ")
            raise ServerUnreachable(f"{self._http.base_url}: {reason}") from None

    def _json(self, answer: httpx.Response) -> Any:
        if answer.status_code != 200:
            raise ServerUnreachable(f"{answer.url}: {answer.status_code}: {_reason(answer.content)}")
        try:
            return orjson.loads(answer.content)
        except orjson.JSONDecodeError:
            raise ServerUnreachable(f"{answer.url} did not answer with JSON") from None


def _reason(body: bytes) -> str:
    """The message in an error object, else the beginning of whatever came."""
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return body[:500].decode(errors="replace")

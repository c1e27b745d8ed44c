"""SGLang's native routes for work: generate, abort, flush, tokenize, and the few that clients merely expect."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from losa_runtime.core.errors import InvalidRequest
from losa_server.errors import RequestFailed
from losa_server.http.body import read_object, unless_disconnected
from losa_server.http.generate_request import GenerateCall, parse_generate
from losa_server.http.guard import not_admin
from losa_server.http.native_answer import native_answer
from losa_server.http.replies import json_reply
from losa_server.http.streaming import manager_of, stream_events, visit_of
from losa_server.http.trace import TraceView
from losa_server.request_manager import Generation, RequestManager

router = APIRouter()

MAX_PATIENCE_S = 600.0  # of one call


@router.post("/generate")
@router.put("/generate")
async def generate(request: Request) -> Response:
    """Complete one prompt or several; see `parse_generate` for the body. Streams events when `stream` is true."""
    manager = manager_of(request)
    call = parse_generate(await read_object(request), manager.settings.max_prompts)
    if call.stream:
        return await stream_events(request, call.asks, lambda generations: _Events(manager, call, generations))
    generations = await unless_disconnected(request, manager.generate(call.asks, visit_of(request)))
    answers = [_answer(manager, call, generation) for generation in generations]
    return json_reply(answers if call.as_list else answers[0])


class _Events:
    """Each event is an answer like that of a plain call, as far as it has come; in a batch with its `index`."""

    def __init__(self, manager: RequestManager, call: GenerateCall, generations: Sequence[Generation]) -> None:
        self._manager, self._call = manager, call
        self._views = {g.rid: TraceView(manager.tokenizer) for g in generations if g.ask.trace}

    def news(self, index: int, generation: Generation) -> Iterator[dict[str, Any]]:
        answer = _answer(self._manager, self._call, generation)
        if generation.rid in self._views:
            answer["trace"] = self._views[generation.rid].take(generation.answer)
        yield {**answer, "index": index} if self._call.as_list else answer

    def end(self) -> Iterator[dict[str, Any]]:
        yield from ()


def _answer(manager: RequestManager, call: GenerateCall, generation: Generation) -> dict[str, Any]:
    return native_answer(generation, manager.tokenizer, call.texts_in_logprobs, call.prompt_ids)


@router.get("/flush_cache")
@router.post("/flush_cache")
async def flush_cache(request: Request) -> Response:
    """Forget cached prefixes; 400 while requests are pending. `?timeout=` seconds to wait for them."""
    manager = manager_of(request)
    given = request.query_params.get("timeout", "0")
    try:
        patience_s = float(given)
    except ValueError:
        patience_s = -1.0
    if not 0 <= patience_s <= MAX_PATIENCE_S:
        raise InvalidRequest("timeout", given, f"seconds from 0 to {MAX_PATIENCE_S:g}")
    deadline = time.monotonic() + patience_s
    while not await manager.client.flush_cache():
        if time.monotonic() >= deadline:
            raise RequestFailed(400, "the cache was not flushed: requests are pending")
        await asyncio.sleep(0.05)
    return PlainTextResponse("Cache flushed.\n")


@router.post("/abort_request")
async def abort_request(request: Request) -> Response:
    """Abort by `rid` (a prefix of it is enough) or all with `abort_all`; 200 whether or not there was any."""
    body = await read_object(request)
    rid, everything = body.get("rid"), body.get("abort_all")
    if rid is not None and not isinstance(rid, str):
        raise InvalidRequest("rid", rid, "a string")
    if everything is not None and type(everything) is not bool:
        raise InvalidRequest("abort_all", everything, "true or false")
    visit = visit_of(request)
    if everything and not visit.caller.admin:
        raise not_admin(visit)
    prefix = "" if everything else rid
    count = manager_of(request).abort(prefix or "", visit) if prefix or everything else 0
    return json_reply({"aborted": count})


@router.post("/concate_and_append_request")
async def concate_and_append_request() -> Response:
    """Nothing to do: the client has joined the texts itself, and the prefix cache finds what is shared."""
    return json_reply({})


@router.get("/start_profile")
@router.post("/start_profile")
@router.get("/stop_profile")
@router.post("/stop_profile")
async def profile() -> Response:
    """Refused."""
    raise RequestFailed(501, "there is no built-in profiler; attach one to the engine process, e.g. py-spy")


@router.post("/tokenize")
@router.post("/v1/tokenize")
async def tokenize(request: Request) -> Response:
    """`{"prompt" or "text": text | [text]}` to `{"tokens", "count", "max_model_len"}`."""
    manager = manager_of(request)
    body = await read_object(request)
    field = "prompt" if "prompt" in body else "text"
    value = body.get(field)
    texts: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(field, value, "a string or a list of strings")
    tokens = [await manager.encode(text, field) for text in texts]
    counts = [len(ids) for ids in tokens]
    many = isinstance(value, list)
    return json_reply(
        {
            "tokens": tokens if many else tokens[0],
            "count": counts if many else counts[0],
            "max_model_len": manager.info.get("context_length"),
        }
    )


@router.post("/detokenize")
@router.post("/v1/detokenize")
async def detokenize(request: Request) -> Response:
    """`{"tokens": [id] | [[id]], "skip_special_tokens": true}` to `{"text"}`."""
    manager = manager_of(request)
    body = await read_object(request)
    value, skip = body.get("tokens"), body.get("skip_special_tokens", True)
    if type(skip) is not bool:
        raise InvalidRequest("skip_special_tokens", skip, "true or false")
    many = isinstance(value, list) and bool(value) and all(isinstance(row, list) for row in value)
    rows: list[Any] = value if many and isinstance(value, list) else [value]
    limit = manager.tokenizer.vocab_size
    if not all(isinstance(row, list) and all(type(i) is int and 0 <= i < limit for i in row) for row in rows):
        raise InvalidRequest("tokens", value, f"a list of ids from 0 to {limit - 1}, or a list of such lists")
    texts = [manager.tokenizer.decode(row, skip) for row in rows]
    return json_reply({"text": texts if many else texts[0]})

"""Answers that come bit by bit: opens the requests, waits for the first news, then turns news into events.

Knows no shape of an answer: an EventMaker has it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from losa_runtime.core.errors import LosaError
from losa_server.errors import RequestFailed, as_failure
from losa_server.http.body import unless_disconnected
from losa_server.http.replies import DONE, EventStream, error_body, event
from losa_server.request_manager import Ask, Generation, RequestManager
from losa_server.visit import Visit


def manager_of(request: Request) -> RequestManager:
    """The request manager of the application."""
    manager: RequestManager = request.app.state.manager
    return manager


def visit_of(request: Request) -> Visit:
    """Who asks, as the outermost middleware has found."""
    visit: Visit = request.scope["state"]["visit"]
    return visit


class EventMaker(Protocol):
    """One call's answer in the making; each value becomes one event."""

    def news(self, index: int, generation: Generation) -> Iterable[Any]:
        """There is news of the generation of `asks[index]`."""

    def end(self) -> Iterable[Any]:
        """All have finished."""


async def stream_events(
    request: Request,
    asks: Sequence[Ask],
    make: Callable[[Sequence[Generation]], EventMaker],
    explain: Callable[[LosaError], RequestFailed] = as_failure,
) -> Response:
    """A stream of events that ends with [DONE]. explain: how an error is told to this client.

    Waits for the engine's first news before the headers are sent, so that a refusal is still a plain 400; it and
    ClientGone are raised.
    """
    manager = manager_of(request)
    generations = await unless_disconnected(request, manager.open_all(asks, visit_of(request)))
    news = manager.stream(generations)
    try:
        first = await unless_disconnected(request, _next(news))
    except BaseException:
        manager.close_all(generations)
        raise
    index_of = {generation.rid: index for index, generation in enumerate(generations)}
    maker = make(generations)

    async def events() -> AsyncIterator[bytes]:
        try:
            for value in maker.news(index_of[first.rid], first):
                yield event(value)
            async for generation in news:
                for value in maker.news(index_of[generation.rid], generation):
                    yield event(value)
            for value in maker.end():
                yield event(value)
        except LosaError as error:
            yield event(error_body(explain(error)))
        yield DONE

    return EventStream(events(), lambda: manager.close_all(generations))


async def _next(news: AsyncIterator[Generation]) -> Generation:
    return await anext(news)

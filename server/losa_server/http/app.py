"""The HTTP application: routes, error objects, body limit. Loads no torch; its engine is a RequestManager."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import losa_runtime
from losa_runtime.chat_template import PLAIN_TEMPLATE
from losa_runtime.core.errors import LosaError
from losa_server.errors import ClientGone, RequestFailed, as_failure
from losa_server.http import info, loads, metrics_route, native
from losa_server.http.description import describe
from losa_server.http.exchange import CLIENT_CLOSED_REQUEST, REQUEST_ID, Exchange, Told, log_exchange
from losa_server.http.guard import Guard
from losa_server.http.limits import Limits
from losa_server.http.openai import chat, completions, models
from losa_server.http.openai.call import served_name
from losa_server.http.replies import error_reply
from losa_server.keys import Keyring
from losa_server.metrics import Metrics
from losa_server.rendering.renderer import Renderer
from losa_server.request_manager import RequestManager
from losa_server.tracing import Tracer

log = logging.getLogger("losa.server")


def create_app(manager: RequestManager, keys: Keyring | None = None, tracer: Tracer | None = None) -> FastAPI:
    """The application around a request manager, which the caller owns and closes. keys: None reads the settings'.

    Its lifespan ends what it has started.
    """
    settings = manager.settings
    app = FastAPI(
        title="losa-runtime", version=losa_runtime.__version__, docs_url=None, redoc_url=None, lifespan=_lifespan
    )
    app.state.manager = manager
    app.state.renderer = _renderer(manager)
    for room in (native, info, loads, models, completions, chat):
        app.include_router(room.router)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(LosaError, _runtime_error)
    app.add_exception_handler(RequestValidationError, _bad_request)
    app.add_exception_handler(HTTPException, _http_error)
    keys = Keyring.of(settings) if keys is None else keys
    describe(app, with_keys=bool(keys))
    # The last one added is the outermost.
    app.add_middleware(Limits, settings=settings)
    app.add_middleware(
        Guard,
        keys=keys,
        local=settings.local,
        host=settings.host,
        origins=settings.allowed_origins,
    )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type", REQUEST_ID),
            expose_headers=(REQUEST_ID,),
        )
    app.add_middleware(Exchange, on_end=_listeners(app, manager, tracer))
    return app


def _listeners(app: FastAPI, manager: RequestManager, tracer: Tracer | None) -> tuple[Told, ...]:
    """Who is told of the end of an exchange: metrics, log, traces, as the settings say."""
    settings = manager.settings
    listeners: list[Told] = []
    if settings.enable_metrics:
        metrics = app.state.metrics = Metrics(manager, served_name(manager))
        manager.watchers.append(metrics)
        app.include_router(metrics_route.router)
        listeners.append(metrics.answered)
    if settings.log_requests:
        listeners.append(log_exchange)
    if tracer is not None:
        listeners.append(tracer.ended)
    return tuple(listeners)


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await app.state.renderer.close()


def _renderer(manager: RequestManager) -> Renderer:
    tokenizer = manager.tokenizer
    template = tokenizer.chat_template
    if template is None:
        log.warning("the checkpoint has no chat template: chat completions use a plain one (USER:…, ASSISTANT:…)")
        template = PLAIN_TEMPLATE
    seconds = manager.settings.chat_template_timeout
    return Renderer(template, tokenizer.named_specials, tokenizer.special_texts, seconds)


async def _runtime_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LosaError)
    return error_reply(as_failure(error))


async def _client_gone(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _bad_request(_: Request, error: Exception) -> Response:
    return error_reply(RequestFailed(400, f"the request cannot be read: {error}"))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_reply(RequestFailed(error.status_code, str(error.detail)), error.headers)

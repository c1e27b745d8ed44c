"""Trace context is read as W3C says; with an endpoint, each exchange becomes a span there."""

from __future__ import annotations

import builtins
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from losa_runtime.core.errors import ConfigError
from losa_server.tracing import Tracer, read_traceparent
from losa_server.visit import TraceParent
from tests.server.app_server import AppServer

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("header", "sampled"),
    [
        (f"00-{TRACE_ID}-{SPAN_ID}-01", True),
        (f"00-{TRACE_ID}-{SPAN_ID}-00", False),
        (f"01-{TRACE_ID}-{SPAN_ID}-03-more", True),
        (f"00-{TRACE_ID}-{SPAN_ID}-01-more", None),
        (f"ff-{TRACE_ID}-{SPAN_ID}-01", None),
        (f"00-{'0' * 32}-{SPAN_ID}-01", None),
        (f"00-{TRACE_ID}-{'0' * 16}-01", None),
        (f"00-{TRACE_ID.upper()}-{SPAN_ID}-01", None),
        ("", None),
        (None, None),
        ("x" * 10_000, None),
    ],
)
def test_traceparent(header: str | None, sampled: bool | None) -> None:
    expected = None if sampled is None else TraceParent(TRACE_ID, SPAN_ID, sampled)
    assert read_traceparent(header) == expected


class Collected:
    """An OTLP endpoint that keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest()
                request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
                for resource in request.resource_spans:
                    outer.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def endpoint() -> Iterator[Collected]:
    collected = Collected()
    yield collected
    collected.close()


def test_a_span_per_exchange(endpoint: Collected, bundled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    tracer = Tracer(endpoint.url)
    body = {"text": ["the fox"] * 2, "sampling_params": {"max_new_tokens": 8}}
    with AppServer(bundled, tracer=tracer) as server:
        header = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "x-request-id": "mine"}
        httpx.post(f"{server.url}/generate", json=body, headers=header)
        httpx.post(f"{server.url}/generate", json={"text": "REFUSE"})
        unsampled = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-00"}
        httpx.get(f"{server.url}/ping", headers=unsampled)
    tracer.close()
    first, second = sorted(endpoint.spans, key=lambda span: span.start_time_unix_nano)
    assert (first.name, first.trace_id.hex(), first.parent_span_id.hex()) == ("POST /generate", TRACE_ID, SPAN_ID)
    attributes = {a.key: a.value.string_value or a.value.int_value for a in first.attributes}
    assert attributes["losa.request_id"] == "mine"
    assert attributes["http.response.status_code"] == 200
    assert (attributes["losa.requests"], attributes["gen_ai.usage.output_tokens"]) == (2, 16)
    assert attributes["losa.ended.length"] == 2
    assert attributes["losa.denoise_steps"] == 4
    assert first.start_time_unix_nano < first.events[0].time_unix_nano <= first.end_time_unix_nano
    assert (second.status.code, second.parent_span_id) == (2, b"")
    assert not [a for a in attributes.values() if "fox" in str(a)]


def test_the_refusal_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry.exporter"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"otlp_endpoint: found 'http://x'.*pip install 'losa-runtime\[otel\]'"):
        Tracer("http://x")

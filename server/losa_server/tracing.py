"""Traces: the W3C context that clients send, and, with --otlp-endpoint, one OpenTelemetry span per exchange.

Spans are made when an exchange has ended, from its visit, so that nothing is traced on the way and no global state is
touched. The OpenTelemetry packages are loaded only if they are wanted.
"""

from __future__ import annotations

import re
import time
from typing import Any

from losa_runtime.core.errors import ConfigError
from losa_server.visit import TraceParent, Visit

EXPORT_S = 2.0  # that one export may take; also bounds how long the server's end may wait for the last one
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def read_traceparent(header: str | None) -> TraceParent | None:
    """The trace context in a `traceparent` header; None if there is none or it is not well-formed."""
    found = _TRACEPARENT.fullmatch(header or "")
    if found is None or (found[4] is not None and header is not None and header.startswith("00")):
        return None
    return TraceParent(found[1], found[2], bool(int(found[3], 16) & 1))


class Tracer:
    """Sends spans to an OTLP endpoint over HTTP, from a thread of its own. Raises ConfigError without the packages."""

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"otlp_endpoint: found {endpoint!r}, but the packages for it are not installed ({error.name}): "
                "pip install 'losa-runtime[otel]'"
            ) from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "losa-runtime"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S)))
        self._tracer = self._provider.get_tracer("losa_server")

    def ended(self, visit: Visit, method: str, path: str, status_code: int) -> None:
        """Record an exchange that has ended just now."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        end_ns = time.time_ns()
        start_ns = end_ns - int((time.monotonic() - visit.started) * 1e9)
        span = self._tracer.start_span(
            f"{method} {path}",
            context=_context(visit.trace),
            kind=SpanKind.SERVER,
            start_time=start_ns,
            attributes=_attributes(visit, method, path, status_code),
        )
        if visit.tally.first_s is not None:
            span.add_event("first tokens", timestamp=start_ns + int(visit.tally.first_s * 1e9))
        if status_code >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_ns)

    def close(self) -> None:
        """Send what is left, and end the thread."""
        self._provider.shutdown()


def _context(parent: TraceParent | None) -> Any:
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    if parent is None:
        return None
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    remote = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(remote))


def _attributes(visit: Visit, method: str, path: str, status_code: int) -> dict[str, str | int | float]:
    tally = visit.tally
    attributes: dict[str, str | int | float] = {
        "http.request.method": method,
        "url.path": path,
        "http.response.status_code": status_code,
        "losa.request_id": visit.id,
    }
    if visit.caller.name:
        attributes["losa.caller"] = visit.caller.name
    if tally.requests:
        attributes |= {
            "losa.requests": tally.requests,
            "gen_ai.usage.input_tokens": tally.prompt_tokens,
            "gen_ai.usage.output_tokens": tally.completion_tokens,
            "losa.cached_tokens": tally.cached_tokens,
            "losa.forwards": tally.forwards,
            "losa.blocks": tally.blocks,
            "losa.denoise_steps": tally.denoise_steps,
            "losa.kv_read_bytes": tally.kv_bytes,
            "losa.kv_dense_bytes": tally.dense_bytes,
            **{f"losa.ended.{outcome}": count for outcome, count in tally.ended.items()},
        }
    return attributes

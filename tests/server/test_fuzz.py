"""Random calls made from the API's own description: none is a fault of ours, and each answer is as described."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_schema_conformance,
    status_code_conformance,
)

from losa_server.http.description import BODIES
from tests.server.app_server import AppServer
from tests.server.test_leaving import until

KEY = "key-of-the-fuzzer"
CHECKS: list[Any] = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, ignored_auth
]  # fmt: skip
# Refused by name with 501, whatever is sent.
LEFT_OUT = ("/start_profile", "/stop_profile")


@pytest.fixture(scope="module")
def target(bundled: str) -> Iterator[AppServer]:
    with AppServer(bundled, log_level="error", api_key=KEY) as running:
        yield running


def operations(server: AppServer) -> list[Any]:
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    found = [result.ok() for result in schema.get_all_operations()]
    return [operation for operation in found if operation.path not in LEFT_OUT]


def fuzz(server: AppServer, examples: int) -> collections.Counter[tuple[str, int]]:
    """`examples` valid and as many invalid calls for each route with a body, some for the others. (route, status) ->
    calls."""
    seen: collections.Counter[tuple[str, int]] = collections.Counter()
    headers = {"Authorization": f"Bearer {KEY}"}
    session_headers = {"headers": headers}

    def call(case: Any) -> None:
        response = case.call(**session_headers)
        seen[case.operation.label, response.status_code] += 1
        case.validate_response(response, checks=CHECKS, transport_kwargs=session_headers)

    for operation in operations(server):
        count = examples if operation.path in BODIES else max(3, examples // 50)
        for mode in GenerationMode:
            if mode is GenerationMode.NEGATIVE and operation.path not in BODIES:
                continue  # there is nothing in it that could be wrong
            run = settings(
                max_examples=count,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(given(operation.as_strategy(generation_mode=mode))(call))
            seed(7)(run)()
    return seen


def check(server: AppServer, seen: collections.Counter[tuple[str, int]]) -> None:
    statuses = {status for _, status in seen}
    assert statuses <= {200, 400, 401, 404, 413, 422, 431}
    assert {("POST /generate", 200), ("POST /generate", 400), ("POST /v1/chat/completions", 200)} <= set(seen)
    assert until(lambda: server.manager.live == 0 and server.engine.live == {}, 20)
    assert server.client.healthy


def test_every_route_with_a_body_is_described(target: AppServer) -> None:
    described = {operation.path for operation in operations(target) if operation.body}
    assert described == set(BODIES)


@pytest.mark.slow
def test_random_calls(target: AppServer) -> None:
    check(target, fuzz(target, 20))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_random_calls(target: AppServer, record: Callable[..., None]) -> None:
    began = time.monotonic()
    seen = fuzz(target, 650)
    statuses: collections.Counter[int] = collections.Counter()
    for (_, status), count in seen.items():
        statuses[status] += count
    seconds = round(time.monotonic() - began)
    record("fuzz", calls=seen.total(), seconds=seconds, routes=len({r for r, _ in seen}), statuses=statuses)
    assert seen.total() >= 10_000
    check(target, seen)

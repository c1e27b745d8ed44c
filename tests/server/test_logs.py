"""What is told of requests: a line each, with names and counts, and never what somebody wrote."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from losa_server.logs import JsonLines, TextLines
from losa_server.visit import Caller
from tests.server.app_server import AppServer
from tests.server.server_process import ServerProcess
from tests.server.test_leaving import until

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "xyzzy-plugh"


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


def lines(told: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(JsonLines("server").format(r)) for r in told.records if r.name == "losa.request"]


def test_a_line_per_request(http: httpx.Client, told: pytest.LogCaptureFixture) -> None:
    body = {"text": ["the red fox"] * 2, "sampling_params": {"max_new_tokens": 9}}
    http.post("/generate", json=body, headers={"x-request-id": "mine", "traceparent": TRACE})
    assert until(lambda: len(lines(told)) == 1)
    line = lines(told)[0]
    assert (line["message"], line["status"], line["request_id"]) == ("POST /generate", 200, "mine")
    assert line["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert (line["requests"], line["completion_tokens"], line["ended"]) == (2, 18, "length")
    assert 0 < line["first_s"] <= line["seconds"]
    assert (line["level"], line["process"], line["logger"]) == ("info", "server", "losa.request")
    assert line["time"].endswith("Z")


def test_probes_are_told_quietly_unless_they_fail(http: httpx.Client, told: pytest.LogCaptureFixture) -> None:
    http.get("/health")
    http.get("/nowhere")
    assert until(lambda: len(lines(told)) == 2)
    assert [(line["level"], line["status"]) for line in lines(told)] == [("debug", 200), ("info", 404)]


def test_no_text_is_told(http: httpx.Client, told: pytest.LogCaptureFixture) -> None:
    calls: list[dict[str, Any]] = [
        {"text": SECRET, "sampling_params": {"max_new_tokens": 5}},
        {"text": SECRET, "stream": True, "sampling_params": {"max_new_tokens": 5}},
        {"text": [SECRET, 5]},
        {"text": SECRET, "sampling_params": {"temperature": SECRET}},
        {"text": SECRET + "REFUSE"},
        {"text": SECRET * 1000},
        {"text": SECRET, "stop": SECRET, "extra_key": SECRET * 100},
        {"messages": [{"role": "user", "content": SECRET}], "model": SECRET},
    ]
    for path in ("/generate", "/tokenize", "/detokenize", "/v1/completions", "/v1/chat/completions"):
        for body in calls:
            http.post(path, json=body)
        http.post(path, content=f'{{"text": "{SECRET}" {SECRET}'.encode())
    texts = [form.format(r) for r in told.records for form in (JsonLines("server"), TextLines("server"))
             if not r.name.startswith(("httpx", "httpcore"))]  # fmt: skip
    assert len(texts) > 60
    assert [text for text in texts if SECRET in text] == []


def test_lines_stay_lines_whatever_a_client_sends(http: httpx.Client, told: pytest.LogCaptureFixture) -> None:
    http.get("/a%0Aserver INFO forged%1b[31m\u2028" + "x" * 500)
    assert until(lambda: len(lines(told)) == 1)
    record = next(r for r in told.records if r.name == "losa.request")
    text = TextLines("server").format(record)
    assert "\n" not in text
    assert "\x1b" not in text
    assert "\u2028" not in text
    assert len(text) < 400


def test_fields_are_at_the_end_of_a_text_line() -> None:
    record = logging.makeLogRecord({"msg": "hello\nworld", "levelname": "INFO", "fields": {"a": 1, "b": "x"}})
    assert TextLines("server").format(record).endswith("server INFO hello\\nworld a=1 b=x")
    assert json.loads(JsonLines("engine").format(record))["message"] == "hello\nworld"


def test_an_exception_is_part_of_its_object() -> None:
    try:
        raise ValueError("boom")
    except ValueError as error:
        record = logging.makeLogRecord({"msg": "m", "exc_info": (ValueError, error, error.__traceback__)})
    line = json.loads(JsonLines("server").format(record))
    assert "ValueError: boom" in line["exception"]


def test_lines_can_be_left_out(bundled: str, told: pytest.LogCaptureFixture) -> None:
    with AppServer(bundled, log_requests=False) as server:
        httpx.get(f"{server.url}/nowhere")
    assert lines(told) == []


def test_the_caller_is_named(bundled: str, told: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ann:secret-of-ann\nbob:secret-of-bob\n")
    with AppServer(bundled, api_key_file=tmp_path / "keys") as server:
        httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer secret-of-ann"})
        httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer other"})
        assert until(lambda: len(lines(told)) == 2)
    assert [(line.get("caller"), line["status"]) for line in lines(told)] == [("ann", 200), (None, 401)]
    assert "secret-of" not in told.text
    assert Caller("ann").name == "ann"


def test_both_processes_write_json_lines(tmp_path: Path, bundled: str) -> None:
    with ServerProcess("--model", bundled, "--log-format", "json", "--log-level", "debug", tmp=tmp_path) as server:
        server.wait_ready()
        httpx.post(f"{server.url}/generate", json={"text": "REFUSE"})
        assert server.stop() == 0
        found = [json.loads(line) for line in server.output().splitlines() if line.startswith("{")]
    assert {line["process"] for line in found} == {"server", "engine"}
    assert [line["status"] for line in found if line["message"] == "POST /generate"] == [500]
    assert any("boom while adding" in line.get("exception", "") for line in found)

"""Hostile input by hand: thousands of bodies that no client would send, and none that the server cannot answer."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.server.app_server import AppServer
from tests.server.test_leaving import until


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e308, -1e308, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63,
    2**64 - 1, -(2**63), "", " ", "\x00", "a", "x" * 10_000, "🙂" * 300, "\u202e\ufeff\u2028", "none", "NaN",
    "__class__", "{{7*7}}", "../../etc/passwd", "<|mask|>", [], [[]], [None], [0], [-1], [2**31], [1.5], [True],
    ["a", None], ["a"] * 40, [[1], [2]], [[1], "a"], [[[]]], list(range(400)), {}, {"": ""}, {"a": {"b": []}},
    {"type": "json_schema"}, nested(50),
]  # fmt: skip
TEXT = {"text": "the fox", "sampling_params": {"max_new_tokens": 2}}
PROMPT = {"model": "", "prompt": "the fox", "max_tokens": 2}
CHAT = {"model": "", "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 2}
SHARED = ("stream", "rid", "priority", "extra_key", "cache_salt", "custom_params", "n", "stop", "temperature", "top_p")
FIELDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "/generate": (
        TEXT,
        (
            *SHARED, "text", "input_ids", "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num",
            "token_ids_logprob", "return_text_in_logprobs", "image_data", "lora_path", "session_params", "model",
        ),
    ),
    "/v1/completions": (
        PROMPT,
        (
            *SHARED, "model", "prompt", "max_tokens", "max_completion_tokens", "logprobs", "echo", "best_of", "suffix",
            "logit_bias", "stream_options", "seed", "user", "response_format", "regex", "json_schema", "top_k",
        ),
    ),
    "/v1/chat/completions": (
        CHAT,
        (
            *SHARED, "model", "messages", "tools", "tool_choice", "logprobs", "top_logprobs", "chat_template_kwargs",
            "response_format", "stream_options", "modalities", "chat_template", "max_completion_tokens", "seed",
        ),
    ),
    "/tokenize": ({"prompt": "a"}, ("prompt", "text")),
    "/detokenize": ({"tokens": [5]}, ("tokens", "skip_special_tokens")),
    "/abort_request": ({"rid": "none"}, ("rid", "abort_all")),
}  # fmt: skip
PARAMS = (
    "max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "logit_bias", "sampling_seed", "stop", "stop_token_ids", "ignore_eos",
    "no_stop_trim", "skip_special_tokens", "n", "regex", "json_schema", "ebnf", "custom_params", "stop_regex",
)  # fmt: skip
CUSTOM = (
    "sparse_method", "token_budget", "active_tokens", "active_ratio", "active_tau", "sparse_options", "algorithm",
    "threshold", "denoising_steps", "trace",
)  # fmt: skip
MESSAGES = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal")


def bodies(path: str) -> Iterator[Any]:
    good, fields = FIELDS[path]
    yield from VALUES
    for field, value in itertools.product(fields, VALUES):
        yield {**good, field: value}
    if path == "/generate":
        for field, value in itertools.product(PARAMS, VALUES):
            yield {"text": "fox", "sampling_params": {"max_new_tokens": 2, field: value}}
        for field, value in itertools.product(CUSTOM, VALUES):
            yield {"text": "fox", "sampling_params": {"max_new_tokens": 2}, "custom_params": {field: value}}
    if path == "/v1/chat/completions":
        for field, value in itertools.product(MESSAGES, VALUES):
            yield {**CHAT, "messages": [{"role": "user", "content": "fox", field: value}]}


@pytest.fixture(scope="module")
def target(bundled: str) -> Iterator[AppServer]:
    with AppServer(bundled, max_body_bytes=2**20, log_level="error") as running:
        yield running


def check(reply: httpx.Response, sent: object) -> None:
    """An answer, or one error object that says what was wrong."""
    assert reply.status_code < 500, (str(sent)[:300], reply.text[:500])
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, sent
        assert error["code"] in (reply.status_code, "model_not_found")
        assert 0 < len(error["message"]) <= 2000
        assert "Traceback" not in error["message"]


@pytest.mark.parametrize(
    "share", [pytest.param(11, id="some"), pytest.param(1, id="all", marks=[pytest.mark.slow, pytest.mark.soak])]
)
@pytest.mark.parametrize("path", sorted(FIELDS))
def test_no_value_anywhere_is_a_fault_of_the_server(
    target: AppServer, path: str, share: int, record: Callable[..., None]
) -> None:
    """Every 11th of them in the fast run, which wanders over fields and values as it divides neither number."""
    with httpx.Client(base_url=target.url, timeout=20) as http:
        statuses: Counter[int] = Counter()
        for body in itertools.islice(bodies(path), 0, None, share):
            reply = http.post(path, content=json.dumps(body).encode())
            check(reply, body)
            statuses[reply.status_code] += 1
    assert until(lambda: target.manager.live == 0 and target.engine.live == {})
    record(f"hand-made bodies for {path}", calls=statuses.total(), statuses=statuses)


RAW = [
    b"", b" ", b"null", b"{}", b"[]", b'""', b"0", b"{", b"}", b'{"a"', b'{"text":', b'{"text": "a"', b"\x00",
    b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"text": "\xc3("}', b'{"text": "\\ud800"}', b'{"text": "\\udc00\\ud800"}',
    b'{"text": "\\u00"}', b'{"text": NaN}', b'{"text": Infinity}', b'{"text": 01}', b'{"text": +1}', b'{"text": .5}',
    b'{"text": 1e999}', b'{"text": ' + b"9" * 5000 + b"}", b'{"text": 0.' + b"1" * 5000 + b"}", b"[" * 100_000,
    b'{"a":' * 100_000, b'{"text": "a", "text": "b"}', b'{"a": {"b": 1, "b": 2}}', b'{"text": "a"} {"text": "b"}',
    b'{"text": "a"}\x00', b"// hi\n{}", b"{'text': 'a'}", b'{"text": "a",}', b'{"text": "\t"}', b"text=a&stream=true",
    b"--x\r\n\r\n--x--", b"\x1f\x8b\x08\x00", b"<xml/>", b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00K\x01.",
    b'{"text": "a"}' + b" " * 10**5,
]  # fmt: skip


@pytest.mark.parametrize("path", sorted(FIELDS))
def test_no_bytes_are_a_fault_of_the_server(target: AppServer, path: str) -> None:
    kinds = (
        "application/json",
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "",
    )
    with httpx.Client(base_url=target.url, timeout=20) as http:
        for raw, kind in itertools.product(RAW, kinds[:2]):
            check(http.post(path, content=raw, headers={"Content-Type": kind}), raw)
        for kind in kinds:
            check(http.post(path, content=b'{"rid": "x"}', headers={"Content-Type": kind}), kind)


def test_odd_paths_queries_methods_and_headers(target: AppServer) -> None:
    paths = ["/", "//", "/generate/", "/v1/models/%00", "/v1/models/" + "x/" * 500, "/%ff%fe", "/..%2f", "/v1//models"]
    paths += ["/v1/models?x=" + "y" * 5000]
    paths += [f"/flush_cache?timeout={v}" for v in ("nan", "inf", "-1", "1e999", "x", "", "%00", "0")]
    methods = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "PROPFIND")
    odd = ("accept-encoding", "expect", "range", "if-none-match", "cookie", "x-forwarded-for", "upgrade", "connection")
    with httpx.Client(base_url=target.url, timeout=20) as http:
        for path, method in itertools.product(paths, methods):
            reply = http.request(method, path)
            assert reply.status_code < 500, (method, path, reply.text)
        for name in odd:
            reply = http.get("/v1/models", headers={name: "\x7f!*identity;q=0"})
            assert reply.status_code < 500, name


@pytest.mark.slow
def test_a_thousand_hostile_calls_leave_nothing_behind(target: AppServer) -> None:
    process = psutil.Process()
    calls = [body for path in ("/generate", "/v1/completions") for body in itertools.islice(bodies(path), 0, None, 4)]
    big = {"text": ["x" * 1000] * 700, "sampling_params": {"n": 8, "stop": ["s" * 256] * 17}}
    with httpx.Client(base_url=target.url, timeout=20) as http:

        def storm(count: int) -> None:
            for body in itertools.islice(itertools.cycle(calls), count):
                http.post("/generate", content=json.dumps(body).encode())
            for _ in range(20):
                http.post("/generate", json=big)
            http.post("/generate", content=b"[" * 900_000)

        storm(300)
        before, files = process.memory_info().rss, process.num_fds()
        storm(1000)
    assert process.memory_info().rss - before < 50 * 2**20
    assert process.num_fds() <= files + 4
    assert until(lambda: target.manager.live == 0 and target.engine.live == {})
    assert target.client._mailboxes == {}

"""Everything that a client can make large or slow has a bound, and the answer beyond it names field, found, allowed."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from losa_server.launch import take_port
from tests.server.app_server import AppServer
from tests.server.test_leaving import until


@pytest.fixture(scope="module")
def strict(bundled: str) -> Iterator[AppServer]:
    """A server with little patience."""
    patience = {"head_timeout": 0.5, "body_timeout": 0.7, "stall_timeout": 0.5}
    sizes = {"max_score_tokens": 100, "max_prompts": 6, "max_prompt_chars": 1000}
    with AppServer(bundled, send_buffer=4096, **sizes, **patience) as running:
        yield running


def raw(server: AppServer, *pieces: bytes, pause_s: float = 0.0, seconds: float = 5.0) -> bytes:
    """Send bytes as they are; what comes back until the server closes."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause_s)
        answer = b""
        while chunk := connection.recv(2**16):
            answer += chunk
        return answer


def error_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


FITS: list[tuple[dict[str, Any], str, Any]] = [
    # (body with what fits, what to change, to what no longer fits)
    ({"sampling_params": {"n": 6}}, "sampling_params.n", 9),
    ({"sampling_params": {"stop": ["x"] * 16}}, "sampling_params.stop", ["x"] * 17),
    ({"sampling_params": {"stop": "x" * 256}}, "sampling_params.stop", "x" * 257),
    ({"sampling_params": {"stop_token_ids": [1] * 256}}, "sampling_params.stop_token_ids", [1] * 257),
    (
        {"sampling_params": {"logit_bias": {str(i): 1 for i in range(300)}}},
        "sampling_params.logit_bias",
        {str(i): 1 for i in range(301)},
    ),
    ({"sampling_params": {"max_new_tokens": 1}}, "sampling_params.max_new_tokens", 2**31),
    ({"sampling_params": {"sampling_seed": 2**63 - 1}}, "sampling_params.sampling_seed", 2**63),
    ({"text": ["a"] * 6}, "text", ["a"] * 7),
    ({"text": ["a"] * 3, "sampling_params": {"n": 2}}, "sampling_params.n", 3),
    ({"text": "a" * 1000}, "text", "a" * 1001),
    ({"rid": "r" * 256}, "rid", "r" * 257),
    ({"text": ["a"] * 2, "rid": "r" * 256}, "rid", "r" * 257),
    ({"extra_key": "k" * 256}, "extra_key", "k" * 257),
    ({"cache_salt": "k" * 256}, "cache_salt", "k" * 257),
    ({"priority": 0}, "priority", 2**31),
    ({"priority": 0}, "priority", -(2**31)),
    ({"return_logprob": True, "logprob_start_len": 0}, "logprob_start_len", 2**31),
]


@pytest.mark.parametrize(("body", "field", "beyond"), FITS, ids=[f"{i}-{f}" for i, (_, f, _) in enumerate(FITS)])
def test_bounds_of_fields(strict: AppServer, body: dict[str, Any], field: str, beyond: Any) -> None:
    body = {"text": "the fox", **body}
    body["sampling_params"] = {"max_new_tokens": 1, **body.get("sampling_params", {})}
    fits = httpx.post(f"{strict.url}/generate", json=body)
    assert fits.status_code == 200, fits.text
    *parents, name = field.split(".")
    place: dict[str, Any] = body
    for parent in parents:
        place = place[parent]
    place[name] = beyond
    refused = httpx.post(f"{strict.url}/generate", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field), refused.text
    message = refused.json()["error"]["message"]
    assert "found" in message
    assert "allowed" in message
    assert len(message) < 500


def test_texts_to_tokenize_are_bounded_too(strict: AppServer) -> None:
    assert httpx.post(f"{strict.url}/tokenize", json={"prompt": "a" * 1000}).status_code == 200
    reply = httpx.post(f"{strict.url}/tokenize", json={"prompt": ["a", "a" * 1001]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")


def test_the_longest_text_follows_the_context(http: httpx.Client, bundled: str) -> None:
    with AppServer(bundled) as server:
        assert server.manager.longest_text == 16 * 4096
    assert http.get("/ping").status_code == 200


def test_scoring_is_bounded_before_it_costs_anything(strict: AppServer) -> None:
    def score(**body: Any) -> httpx.Response:
        body = {"return_logprob": True, "sampling_params": {"max_new_tokens": 0}, **body}
        return httpx.post(f"{strict.url}/generate", json=body)

    added = strict.engine.added
    assert score(input_ids=[5] * 100, logprob_start_len=0).status_code == 200
    assert score(input_ids=[5] * 1000, logprob_start_len=900).status_code == 200
    assert score(input_ids=[5] * 1000, logprob_start_len=-1).status_code == 200
    assert score(input_ids=[[5] * 60] * 2, logprob_start_len=[10, 10]).status_code == 200
    for body in (
        {"input_ids": [5] * 101, "logprob_start_len": 0},
        {"input_ids": [5] * 101},
        {"input_ids": [[5] * 60] * 2, "logprob_start_len": 9},
    ):
        reply = score(**body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "logprob_start_len")
        assert "--max-score-tokens" in reply.json()["error"]["message"]
    assert strict.engine.added == added + 5
    reply = httpx.post(f"{strict.url}/generate", json={"input_ids": [[5], [5] * 4097]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input_ids.1")
    assert strict.engine.added == added + 5


# --- heads -----------------------------------------------------------------------------------------------------------


def test_too_many_or_too_large_headers(strict: AppServer) -> None:
    few = {f"x-{i}": "1" for i in range(90)}
    assert httpx.get(f"{strict.url}/ping", headers=few).status_code == 200
    for headers in ({f"x-{i}": "1" for i in range(101)}, {"x": "y" * 32_000, "z": "y" * 700}):
        reply = httpx.get(f"{strict.url}/ping", headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (431, 431), len(headers)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 20_000, 431),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"\xff" * 100 + b"\r\n\r\n", 400),
    ],
    ids=range(10),
)  # fmt: skip
def test_bytes_that_are_no_request(strict: AppServer, sent: bytes, status: int) -> None:
    found, error = error_of(raw(strict, sent))
    assert (found, error["code"]) == (status, status)
    assert set(error) == {"message", "type", "param", "code"}


def test_numbers_of_the_head_that_no_integer_holds(strict: AppServer) -> None:
    answer = raw(strict, b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 6000 + b"\r\n\r\n")
    assert error_of(answer)[0] in (400, 413)


def test_a_head_that_trickles_is_not_waited_for(strict: AppServer) -> None:
    started = time.monotonic()
    assert error_of(raw(strict, b"GET /ping HTTP/1.1\r\n"))[0] == 408
    assert raw(strict) == b""  # who says nothing is told nothing
    assert time.monotonic() - started < 4


def test_a_connection_in_use_may_rest_between_requests(strict: AppServer) -> None:
    with httpx.Client(base_url=strict.url) as client:
        for _ in range(4):
            stream = client.get("/ping").extensions["network_stream"]
            time.sleep(0.3)
        assert client.get("/ping").extensions["network_stream"] is stream


# --- bodies and answers ----------------------------------------------------------------------------------------------


def test_a_body_that_trickles_is_not_waited_for(strict: AppServer) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n"
    status, error = error_of(raw(strict, head + b"{", b" ", b" ", pause_s=0.1))
    assert (status, error["param"]) == (408, "body")
    assert "1 bytes" in error["message"] or "3 bytes" in error["message"]


def test_a_long_answer_is_not_a_late_body(strict: AppServer) -> None:
    body = {"text": "SLOW fox", "sampling_params": {"max_new_tokens": 80}}
    assert httpx.post(f"{strict.url}/generate", json=body, timeout=20).status_code == 200


def test_a_client_that_does_not_read_is_cut_off(strict: AppServer) -> None:
    aborted = strict.engine.aborted
    body = {"text": ["fox and hen " * 80, "HANG"], "stream": True, "sampling_params": {"max_new_tokens": 3500}}
    raw_body = json.dumps(body).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(strict.url.rpartition(":")[2])))
        head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(raw_body)
        connection.sendall(head + raw_body)
        assert until(lambda: len(strict.engine.live) == 2, 10)
        assert until(lambda: strict.engine.live == {}, 20)
        assert strict.engine.aborted > aborted
    assert until(lambda: strict.manager.live == 0, 5)


def test_connections_are_told_not_to_wait_for_acknowledgements() -> None:
    """Otherwise the second packet of each answer waits 40 ms on connections that are kept."""

    async def scenario() -> int:
        flags: asyncio.Queue[int] = asyncio.Queue()

        async def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            flags.put_nowait(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = take_port("127.0.0.1", 0)
        async with await asyncio.start_server(accepted, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            flag = await flags.get()
            writer.close()
        return flag

    assert asyncio.run(scenario()) != 0

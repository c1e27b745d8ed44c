"""The native routes over real HTTP and real zmq sockets, with the echo engine behind them."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
import warnings
from typing import Any

import httpx
import pytest

from losa_server.errors import for_strangers
from tests.server.app_server import AppServer
from tests.server.test_generate_request import BAD


def generate(http: httpx.Client, **body: Any) -> Any:
    reply = http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def events(http: httpx.Client, **body: Any) -> list[Any]:
    """The events of a stream; the last one must be [DONE]."""
    with http.stream("POST", "/generate", json={**body, "stream": True}) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_generate(http: httpx.Client) -> None:
    answer = generate(http, text="the red fox", sampling_params={"max_new_tokens": 9})
    meta = answer["meta_info"]
    assert answer["text"].startswith("the red fox")
    assert len(answer["output_ids"]) == meta["completion_tokens"] == 9
    assert meta["finish_reason"] == {"type": "length", "length": 9}
    assert meta["e2e_latency"] > 0
    assert (meta["kv_density"], meta["active_share"], meta["forwards"]) == (0.25, 0.5, 3)
    assert meta["tokens_per_forward"] == 3
    assert "input_token_logprobs" not in meta


def test_put_and_input_ids_and_lists(http: httpx.Client) -> None:
    reply = http.put("/generate", json={"input_ids": [[50, 60], [70]], "sampling_params": {"max_new_tokens": 4}})
    assert [a["output_ids"] for a in reply.json()] == [[50, 60, 50, 60], [70] * 4]
    reply = http.post("/generate", json={"input_ids": [70], "sampling_params": {"max_new_tokens": 1}})
    assert reply.json()["output_ids"] == [70]


def test_n_gives_a_list(http: httpx.Client) -> None:
    assert len(generate(http, text="fox", sampling_params={"max_new_tokens": 1, "n": 3})) == 3


def test_many_prompts_with_params_of_their_own(http: httpx.Client) -> None:
    texts = [f"the fox {i}" for i in range(400)]
    answers = generate(http, text=texts, sampling_params=[{"max_new_tokens": 1 + i % 3} for i in range(400)])
    assert [a["meta_info"]["completion_tokens"] for a in answers] == [1 + i % 3 for i in range(400)]


def test_stop_string_is_trimmed(http: httpx.Client) -> None:
    answer = generate(http, text="the red fox", sampling_params={"max_new_tokens": 20, "stop": " fox"})
    assert answer["text"] == "the red"
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": " fox"}


def test_cache_only(http: httpx.Client) -> None:
    answer = generate(http, text="the red fox", sampling_params={"max_new_tokens": 0})
    assert (answer["text"], answer["output_ids"]) == ("", [])
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert generate(http, text="", sampling_params={"max_new_tokens": 0})["meta_info"]["prompt_tokens"] == 0


def test_stream_is_cumulative_and_ends_with_done(http: httpx.Client) -> None:
    news = events(http, text="the red fox über 漢字", sampling_params={"max_new_tokens": 18})
    texts = [n["text"] for n in news]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert [n["meta_info"]["finish_reason"] for n in news[:-1]] == [None] * (len(news) - 1)
    assert news[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 18}
    assert (
        news[-1]["text"] == generate(http, text="the red fox über 漢字", sampling_params={"max_new_tokens": 18})["text"]
    )
    assert "index" not in news[0]


def test_batch_stream_has_indices(http: httpx.Client) -> None:
    news = events(http, text=["the fox", "a hen"], sampling_params={"max_new_tokens": 8})
    last = {n["index"]: n["text"] for n in news}
    assert last[0].startswith("the fox")
    assert last[1].startswith("a hen")


def test_output_logprobs(http: httpx.Client) -> None:
    answer = generate(http, text="the fox", sampling_params={"max_new_tokens": 2}, return_logprob=True)
    meta = answer["meta_info"]
    assert meta["input_token_logprobs"] == []
    assert meta["output_token_logprobs"] == [[-0.5, i, None] for i in answer["output_ids"]]


@pytest.mark.parametrize("start", [0, 1, 3])
def test_prompt_logprobs_have_the_length_that_was_asked_for(http: httpx.Client, start: int) -> None:
    answer = generate(
        http,
        text="the fox and the hen!",
        sampling_params={"max_new_tokens": 2},
        return_logprob=True,
        logprob_start_len=start,
        return_text_in_logprobs=True,
    )
    meta = answer["meta_info"]
    entries = meta["input_token_logprobs"]
    assert len(entries) == meta["prompt_tokens"] - start
    assert "".join(text for _, _, text in entries).endswith("the hen!")
    assert all(-10_000 < value < 0 for value, _, _ in entries)
    assert entries[-1][0] == -9999.0  # impossible, yet a number


def test_prompt_logprobs_without_generation_start_at_0(http: httpx.Client) -> None:
    body = {"input_ids": [[50, 60, 50]], "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
    meta = generate(http, **body)[0]["meta_info"]
    assert meta["input_token_logprobs"] == [[-2.0, 50, None], [-2.0, 60, None], [-1e-9, 50, None]]
    assert meta["output_token_logprobs"] == []


def test_alternatives(http: httpx.Client) -> None:
    body: dict[str, Any] = {
        "input_ids": [[70, 80, 90], [71]],
        "sampling_params": {"max_new_tokens": 1},
        "return_logprob": [True, False],
        "logprob_start_len": 1,
        "top_logprobs_num": 2,
        "token_ids_logprob": [81, 80],
        "return_text_in_logprobs": True,
    }
    first, second = generate(http, **body)
    meta = first["meta_info"]
    text = {i: http.post("/detokenize", json={"tokens": [i]}).json()["text"] for i in (70, 71, 80, 81)}
    assert meta["output_top_logprobs"] == [[[-0.5, 70, text[70]], [-1.5, 71, text[71]]]]
    assert meta["output_token_ids_logprobs"] == [[[-9999.0, 81, text[81]], [-9999.0, 80, text[80]]]]
    assert meta["input_token_ids_logprobs"][0] == [[-9999.0, 81, text[81]], [-0.5, 80, text[80]]]
    assert [row[0][1] for row in meta["input_top_logprobs"]] == [80, 90]
    assert not any("logprob" in name for name in second["meta_info"])


def test_a_trace_shows_the_block_step_by_step(http: httpx.Client) -> None:
    body = {"text": "the red fox", "sampling_params": {"max_new_tokens": 6, "custom_params": {"trace": True}}}
    news = events(http, **body)
    steps = [step for n in news for step in n["trace"]]
    assert [step["block"] for step in steps] == [[0, 4], [4, 6]]
    assert [i for step in steps for i in step["ids"]] == news[-1]["output_ids"]
    assert [entry[0] for step in steps for entry in step["revealed"]] == list(range(6))
    assert "".join(text for step in steps for text in step["texts"]) == news[-1]["text"]
    reply = http.post("/generate", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "sampling_params.custom_params.trace")
    assert all("trace" not in n for n in events(http, text="a", sampling_params={"max_new_tokens": 6}))


def test_prompt_ids_come_back_when_asked_for(http: httpx.Client) -> None:
    answer = generate(http, text="fox", sampling_params={"max_new_tokens": 0}, return_prompt_token_ids=True)
    assert answer["prompt_token_ids"] == http.post("/tokenize", json={"text": "fox"}).json()["tokens"]
    assert "prompt_token_ids" not in generate(http, text="fox", sampling_params={"max_new_tokens": 0})


# Without the batches that are too large for the parser's test alone: this server's limit is higher.
BAD_HERE = [
    (body, field) for body, field in BAD[1:] if not (isinstance(body.get("text"), list) and len(body["text"]) >= 40)
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "field"), BAD_HERE, ids=[f"{i}-{f}" for i, (_, f) in enumerate(BAD_HERE)])
def test_bad_bodies(http: httpx.Client, body: dict[str, Any], field: str, stream: bool) -> None:
    reply = http.post("/generate", json={"stream": stream, **body})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field
    assert field in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_refusals_come_before_the_stream(http: httpx.Client, stream: bool) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"text": ""}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"text": "the " * 5000}, "text"),
        ({"text": "the fox", "return_logprob": True, "logprob_start_len": 50}, "logprob_start_len"),
    ]
    for body, field in refused:
        reply = http.post("/generate", json={**body, "stream": stream})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, field), body
    reply = http.post("/generate", json={"text": ["the fox", "the " * 5000], "stream": stream})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "text.1")
    assert http.post("/generate", json={"text": "REFUSE", "stream": stream}).status_code == 500
    assert http.get("/health").status_code == 200


BROKEN = [
    b"{", b"[1]", b'"x"', b"nul", b"\xff", b'{"text": NaN}', b"[" * 100_000, b"7" * 5000, b'{"seed": 1e999}',
    b'{"text": "a", "text": "b"}', b'{"text": "a", "\\u0074ext": "b"}', b'{"a": [{"b": {"c": 1, "c": 1}}]}',
    b'{"text": "\\ud800"}', b'{"a": -Infinity}', b'{"text": "\x00"}', b'{"a": ' * 65 + b"1" + b"}" * 65,
    b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", b"\xef\xbb\xbf{}", b'{"text": "a",}', b"{'text': 'a'}",
]  # fmt: skip


@pytest.mark.parametrize("raw", BROKEN, ids=range(len(BROKEN)))
def test_broken_json(http: httpx.Client, raw: bytes) -> None:
    reply = http.post("/generate", content=raw, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "body"


def test_too_large_bodies(http: httpx.Client) -> None:
    assert http.post("/generate", content=b"x" * (2**20 + 1)).status_code == 413

    def trickle() -> Any:
        for _ in range(20):
            yield b" " * 2**16

    assert http.post("/generate", content=trickle()).status_code == 413


def test_unknown_routes_and_methods_have_our_error_object(http: httpx.Client) -> None:
    for method, path, code, kind in [
        ("GET", "/nowhere", 404, "not_found_error"),
        ("GET", "/generate", 405, "invalid_request_error"),
        ("DELETE", "/v1/models", 405, "invalid_request_error"),
    ]:
        reply = http.request(method, path)
        assert reply.status_code == code
        error = reply.json()["error"]
        assert (set(error), error["code"], error["type"]) == ({"message", "type", "param", "code"}, code, kind)
    assert http.get("/generate").headers["allow"]


def test_requests_have_names(http: httpx.Client) -> None:
    assert http.get("/ping", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    ids = [http.get("/ping", headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a b", "x" * 200)]
    assert len(set(ids)) == 3
    assert all(len(i) == 32 for i in ids)


def test_a_fault_of_ours_is_told_without_its_insides(
    http: httpx.Client, server: AppServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(text: str) -> list[int]:
        raise OSError(f"{__file__} at 0x7f001122 has {text}")

    monkeypatch.setattr(server.manager.tokenizer, "encode", broken)
    reply = http.post("/generate", json={"text": "secret"})
    assert (reply.status_code, reply.json()["error"]["message"]) == (500, "internal error (OSError)")
    assert reply.headers["x-request-id"]


def test_messages_for_strangers() -> None:
    fault = 'cannot read /home/ann/m/a.py: <Lock object at 0x7f2a1b>\nTraceback (most recent call last)\n  File "x"'
    assert for_strangers(fault, ours=True) == "cannot read <path>: <Lock object at 0x…>\n"
    assert for_strangers("model: found '/m/a'", ours=False) == "model: found '/m/a'"
    assert for_strangers("see http://127.0.0.1:30000/v1/models and 1/2", ours=True).endswith("/v1/models and 1/2")
    assert len(for_strangers("x" * 10_000, ours=False)) == 2000


def test_the_description_of_the_api_is_sound(http: httpx.Client) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = http.get("/openapi.json").json()["paths"]
    assert set(paths["/generate"]) == {"post", "put"}


def test_info_routes(http: httpx.Client, bundled: str) -> None:
    empty = {"Content-Type": "application/json; charset=utf-8"}
    for path in ("/health", "/ready", "/ping", "/health_generate"):
        assert http.get(path, headers=empty).status_code == 200, path
    for path in ("/get_model_info", "/model_info"):
        info = http.get(path, headers=empty).json()
        assert (info["model_path"], info["is_generation"]) == (bundled, True)
    for path in ("/get_server_info", "/server_info", "/get_server_args"):
        info = http.get(path, headers=empty).json()
        assert info["internal_states"][0]["running"] == 0
        assert info["version"]
    card = http.get("/v1/models").json()["data"][0]
    assert (card["id"], card["owned_by"], card["max_model_len"]) == (bundled, "sglang", 4096)
    assert http.get(f"/v1/models/{bundled}").json() == card
    assert http.get("/v1/models/other").status_code == 404


def test_small_routes(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "the red fox"}).json()
    assert ids["count"] == len(ids["tokens"]) > 1
    assert http.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"text": "the red fox"}
    assert http.post("/tokenize", json={"text": ["a", "b"]}).json()["count"] == [1, 1]
    assert http.post("/detokenize", json={"tokens": [ids["tokens"], []]}).json()["text"] == ["the red fox", ""]
    assert http.post("/tokenize", json={"text": 5}).json()["error"]["param"] == "text"
    assert http.post("/detokenize", json={"tokens": [10**9]}).json()["error"]["param"] == "tokens"
    assert http.post("/concate_and_append_request", json={"src_rids": ["a"], "dst_rid": "b"}).status_code == 200
    for method in ("GET", "POST"):
        assert http.request(method, "/start_profile").status_code == 501
        assert http.request(method, "/flush_cache", headers={"Content-Type": "application/json"}).status_code == 200
    for bad in ("soon", "nan", "inf", "-1", "601"):
        assert http.post(f"/flush_cache?timeout={bad}").status_code == 400


def test_long_texts_do_not_stop_the_event_loop(server: AppServer, http: httpx.Client) -> None:
    lags: list[float] = []

    async def measure() -> None:
        for _ in range(40):
            started = time.monotonic()
            await asyncio.sleep(0.01)
            lags.append(time.monotonic() - started - 0.01)

    text = "the red fox " * 80_000
    started = time.monotonic()
    server.engine.tokenizer.encode(text)
    alone = time.monotonic() - started
    measuring = asyncio.run_coroutine_threadsafe(measure(), server.loop)
    assert http.post("/generate", json={"text": text}).status_code == 400
    measuring.result(20)
    assert sorted(lags)[-2] < max(0.25, alone / 4)  # the machine is shared; the aim is 0.05


def test_the_application_loads_no_torch() -> None:
    code = (
        "import sys, losa_server.cli, losa_server.http.app, losa_server.launch, losa_server.engine_process;"
        "losa_server.cli.make_parser();"
        "heavy = {'torch', 'losa_runtime.engine', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_text_of_the_mask_stays_text(http: httpx.Client, server: AppServer) -> None:
    """A prompt that spells the mask has no holes; other special tokens in a native prompt are the client's template."""
    mask = server.engine.tokenizer.mask_token_id
    assert mask is not None
    spelled = server.engine.tokenizer.token_text(mask)
    text = f"say {spelled}{spelled} twice"
    generate(http, text=text, sampling_params={"max_new_tokens": 1})
    http.post("/v1/completions", json={"prompt": text, "max_tokens": 1})
    http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}], "max_tokens": 1})
    seen = [request.prompt_ids for request in server.engine.seen[-3:]]
    assert all(mask not in ids and spelled in server.engine.tokenizer.decode(ids, False) for ids in seen)
    assert mask not in http.post("/tokenize", json={"text": text}).json()["tokens"]

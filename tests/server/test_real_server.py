"""The server with the real engine: two processes, a tiny checkpoint with random weights, SGLang's unchanged frontend.

The short part checks the way of a request once; the slow part is the whole client suite.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import sglang as sgl

from tests.server.server_process import ROOT, ServerProcess

METHODS = [sgl.token_length_normalized, sgl.greedy_token_selection, sgl.unconditional_likelihood_normalized]
TEXT = "The quiet fox walked along the river to Halden and watched the gulls. " * 4
GREEDY = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("real")
    make = [sys.executable, "-m", "losa_server", "make-checkpoint", str(folder / "model"), "--preset", "tiny"]
    subprocess.run(make, check=True, capture_output=True, cwd=ROOT)
    options = ["--model", str(folder / "model"), "--max-total-tokens", "16384", "--token-budget", "64"]
    with ServerProcess(*options, fake=False, tmp=folder) as server:
        server.wait_ready()
        yield server
        assert server.stop() == 0, server.output()
        assert server.socket_directories() == []


@pytest.fixture
def http(real: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        assert client.post("/flush_cache?timeout=10").status_code == 200
        yield client


@pytest.fixture
def endpoint(real: ServerProcess) -> Iterator[Any]:
    backend = sgl.RuntimeEndpoint(real.url)
    sgl.set_default_backend(backend)
    yield backend
    sgl.set_default_backend(None)


def generate(http: httpx.Client, **body: Any) -> Any:
    reply = http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(http: httpx.Client, **body: Any) -> list[Any]:
    with http.stream("POST", "/generate", json={**body, "stream": True}) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


@sgl.function
def choose(s: Any, prompt: str, choices: list[str], method: Any) -> None:
    s += prompt + sgl.select("choice", choices=choices, choices_method=method)


@sgl.function
def read_and_fork(s: Any, text: str) -> None:
    s += text
    s.sync()
    branches = s.fork(3)
    for i, branch in enumerate(branches):
        branch += f"number {i}" + sgl.gen("part", max_tokens=4, temperature=0)
    for branch in branches:
        branch.sync()
    s += "".join(branch["part"] for branch in branches)
    s.set_var("cached", [branch.get_meta_info("part")["cached_tokens"] for branch in branches])


def test_the_way_of_a_request(http: httpx.Client, endpoint: Any) -> None:
    info = http.get("/get_server_info").json()
    assert info["internal_states"][0]["running"] == 0
    assert info["block_length"] == 16
    first = generate(http, text=TEXT, sampling_params=GREEDY)
    assert first["meta_info"]["completion_tokens"] == 12
    assert first["meta_info"]["cached_tokens"] == 0
    again = stream(http, text=TEXT, sampling_params=GREEDY)[-1]
    assert again["output_ids"] == first["output_ids"]
    assert again["text"] == first["text"]
    assert again["meta_info"]["cached_tokens"] >= 256
    state = choose.run("The fox", [" sleeps", " eats"], sgl.token_length_normalized)
    assert state["choice"] in (" sleeps", " eats")
    reply = http.post("/generate", json={"text": TEXT, "sampling_params": {"custom_params": {"sparse_method": "none"}}})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "sampling_params.custom_params.sparse_method"
    reply = http.post("/generate", json={"input_ids": [[5], [5, 259]], "sampling_params": GREEDY})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input_ids.1.1")


@pytest.mark.slow
class TestWholeSuite:
    @pytest.mark.parametrize("method", ["dense", "quest", "losa"])
    def test_methods_per_request(self, http: httpx.Client, method: str) -> None:
        custom = {"sparse_method": method} | ({} if method == "dense" else {"token_budget": 64})
        meta = generate(http, text=TEXT, sampling_params={**GREEDY, "max_new_tokens": 32, "custom_params": custom})[
            "meta_info"
        ]
        assert meta["completion_tokens"] <= 32
        assert meta["denoise_steps"] > 1
        assert meta["kv_density"] == 1.0 if method == "dense" else 0 < meta["kv_density"] < 1

    def test_batches_equal_single_calls(self, http: httpx.Client) -> None:
        texts = [TEXT[i:] for i in range(0, 60, 7)]
        alone = [generate(http, text=text, sampling_params=GREEDY)["output_ids"] for text in texts]
        assert http.post("/flush_cache").status_code == 200
        together = generate(http, text=texts, sampling_params=GREEDY)
        assert [a["output_ids"] for a in together] == alone

    def test_samples_of_a_seed(self, http: httpx.Client) -> None:
        params = {"temperature": 1.0, "max_new_tokens": 12, "n": 3, "sampling_seed": 7}
        once, twice = (generate(http, text=TEXT, sampling_params=params) for _ in range(2))
        assert [a["output_ids"] for a in once] == [a["output_ids"] for a in twice]
        assert len({str(a["output_ids"]) for a in once}) > 1

    def test_namespaces_share_nothing(self, http: httpx.Client) -> None:
        def cached(**body: Any) -> int:
            count: int = generate(http, text=TEXT, sampling_params={"max_new_tokens": 0}, **body)["meta_info"][
                "cached_tokens"
            ]
            return count

        assert [cached(), cached() > 0, cached(cache_salt="a"), cached(cache_salt="a") > 0] == [0, True, 0, True]
        assert [cached(extra_key="a"), cached(extra_key="a") > 0] == [0, True]

    def test_logprobs_do_not_depend_on_the_cache(self, http: httpx.Client) -> None:
        body = {
            "text": TEXT,
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 200,
        }
        cold, warm = (generate(http, **body)["meta_info"] for _ in range(2))
        assert warm["cached_tokens"] > 0
        pairs = zip(cold["input_token_logprobs"], warm["input_token_logprobs"], strict=True)
        assert all(abs(a[0] - b[0]) < 1e-3 and a[1] == b[1] for a, b in pairs)
        assert len(cold["input_token_logprobs"]) == cold["prompt_tokens"] - 200

    def test_logprobs_of_prompt_and_output_together(self, http: httpx.Client) -> None:
        meta = generate(http, text=TEXT, sampling_params=GREEDY, return_logprob=True, logprob_start_len=250)[
            "meta_info"
        ]
        assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"] - 250
        assert len(meta["output_token_logprobs"]) == 12
        assert all(-100 < entry[0] < 0 for entry in meta["output_token_logprobs"])

    @pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
    @pytest.mark.parametrize("prompt", ["", "a", TEXT])
    def test_select(self, endpoint: Any, method: Any, prompt: str) -> None:
        choices = [" green", " red", " quite another colour"]
        state = choose.run(prompt, choices, method)
        assert state.error() is None
        entries = state.get_meta_info("choice")["input_token_logprobs"]
        if prompt:
            assert ["".join(text for _, _, text in option) for option in entries] == choices

    def test_select_agrees_with_the_score_of_the_whole_text(self, http: httpx.Client, endpoint: Any) -> None:
        state = choose.run(TEXT, [" green", " red"], sgl.token_length_normalized)
        for choice, mean in zip(
            (" green", " red"), state.get_meta_info("choice")["normalized_prompt_logprobs"], strict=True
        ):
            start = generate(http, text=TEXT, sampling_params={"max_new_tokens": 0})["meta_info"]["prompt_tokens"]
            body = {"text": TEXT + choice, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
            entries = generate(http, **body, logprob_start_len=start)["meta_info"]["input_token_logprobs"]
            assert sum(e[0] for e in entries) / len(entries) == pytest.approx(mean, abs=1e-3)

    def test_fork_reads_the_prefix_once(self, endpoint: Any) -> None:
        endpoint.flush_cache()
        state = read_and_fork.run(TEXT)
        assert state.error() is None
        assert all(count >= len(TEXT) // 16 * 16 for count in state["cached"])

    def test_stream_through_the_frontend(self, endpoint: Any) -> None:
        @sgl.function
        def program(s: Any) -> None:
            s += TEXT + sgl.gen("answer", max_tokens=40, temperature=0)

        state = program.run(stream=True)
        pieces = list(state.text_iter("answer"))
        assert "".join(pieces) == state["answer"] == program.run()["answer"]
        assert len(pieces) > 1

    def test_run_batch(self, endpoint: Any) -> None:
        @sgl.function
        def program(s: Any, i: int) -> None:
            s += TEXT + f"number {i}" + sgl.gen("answer", max_tokens=8, temperature=0)

        states = program.run_batch([{"i": i} for i in range(24)], num_threads=12)
        assert [s.error() for s in states] == [None] * 24

    def test_clients_that_leave(self, real: ServerProcess, http: httpx.Client) -> None:
        def leave(i: int) -> None:
            body = {"text": f"{i} {TEXT}", "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}}
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{real.url}/generate", json={**body, "stream": False}, timeout=httpx.Timeout(5, read=0.5))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(leave, range(8)))
        assert http.post("/flush_cache?timeout=10").status_code == 200
        state = http.get("/server_info").json()["internal_states"][0]
        assert 0 < state["forward_s"] < state["busy_s"]  # the rest is the host's
        assert (state["running"], state["waiting"], state["live_requests"], state["pages_owned"]) == (0, 0, 0, 0)
        assert state["pages_free"] == state["pages_total"]

    def test_stop_strings_and_budget(self, http: httpx.Client) -> None:
        whole = generate(http, text=TEXT, sampling_params={**GREEDY, "max_new_tokens": 40, "ignore_eos": True})
        assert whole["meta_info"]["completion_tokens"] == 40
        stop = whole["text"][5:8]
        cut = generate(
            http, text=TEXT, sampling_params={**GREEDY, "max_new_tokens": 40, "ignore_eos": True, "stop": stop}
        )
        assert cut["text"] == whole["text"][: whole["text"].index(stop)]
        assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}

    def test_constrained_samples_and_streams(self, http: httpx.Client) -> None:
        pattern = "(?:[a-z]{2,9} ){2,5}[0-9]{2}"
        form = {"regex": pattern, "max_new_tokens": 60, "temperature": 1.0, "sampling_seed": 3}
        samples = generate(http, text=TEXT, sampling_params=form | {"n": 3})
        assert len({sample["text"] for sample in samples}) == 3
        assert all(re.fullmatch(pattern, sample["text"]) for sample in samples)
        [*_, last] = stream(http, text=TEXT, sampling_params=form)
        assert last["text"] == generate(http, text=TEXT, sampling_params=form)["text"]
        assert re.fullmatch(pattern, last["text"])
        schema = json.dumps({"type": "object", "properties": {"a": {"enum": list(range(3000))}}, "required": ["a"]})
        answer = generate(http, text=TEXT, sampling_params={"json_schema": schema, "max_new_tokens": 20})
        assert json.loads(answer["text"])["a"] in range(3000)

    def test_hostile_patterns_hold_up_nobody(self, real: ServerProcess, http: httpx.Client) -> None:
        hostile: list[dict[str, Any]] = [
            {"regex": "((a{1,100}){1,100}){1,100}"},
            {"regex": "a{1,1000000}"},
            {"regex": r"(\w{1,99}){1,99}"},
            {"regex": "(" * 5000 + "a" + ")" * 5000},
            {"regex": "a", "stop": ["a"]},
            {"json_schema": json.dumps({"$ref": "#"})},
            {"json_schema": json.dumps({"enum": [str(i) * 20 for i in range(20000)]})},
            {"json_schema": '{"items": ' * 5000 + "{}" + "}" * 5000},
        ]
        known = {"regex": "[a-z]{3}", "max_new_tokens": 4}
        generate(http, text="a", sampling_params=known)
        order: list[str] = []

        def attack(asked: dict[str, Any]) -> httpx.Response:
            reply = httpx.post(f"{real.url}/generate", json={"text": "a", "sampling_params": asked}, timeout=60)
            order.append("hostile")
            return reply

        with ThreadPoolExecutor(4) as threads:  # as many new patterns as are let in
            replies = [threads.submit(attack, asked) for asked in hostile]
            while not all(reply.done() for reply in replies):
                generate(http, text="a", sampling_params={"max_new_tokens": 4})
                assert re.fullmatch("[a-z]{3}", generate(http, text="a", sampling_params=known)["text"])
                order.append("good")
        assert order.index("good") < len(order) - 1 - order[::-1].index("hostile")
        for reply, asked in zip(replies, hostile, strict=True):
            assert reply.result().status_code == 400, (asked, reply.result().text)
            assert reply.result().json()["error"]["param"].startswith(f"sampling_params.{next(iter(asked))}")
        state = http.get("/server_info").json()["internal_states"][0]
        assert state["patterns"] >= 1 and state["grammars"] >= 1
        assert state["pattern_bytes"] > 0 and state["grammar_bytes"] > 0

    def test_over_long_prompts(self, http: httpx.Client) -> None:
        for stream_it in (False, True):
            reply = http.post("/generate", json={"text": TEXT * 20, "stream": stream_it})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "text")
        reply = http.post("/generate", json={"text": TEXT, "sampling_params": {"max_new_tokens": 4000}})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "sampling_params.max_new_tokens")

    def test_a_literal_mask_is_text(self, http: httpx.Client) -> None:
        answer = generate(http, text="a <|MASK|> b", sampling_params=GREEDY)
        assert answer["meta_info"]["prompt_tokens"] > 5

    def test_generate_command(self, bundled: str) -> None:
        command = [
            sys.executable,
            "-m",
            "losa_server",
            "generate",
            "--model",
            bundled,
            "--chat",
            "--max-new-tokens",
            "8",
        ]
        options = ["--prompt", "The secret code of the red fox is 1234.\n\nWhat is the secret code of the red fox?"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert "prompt of" in done.stderr
        done = subprocess.run(
            [*command, "--dtype", "auto", "--page-size", "3"], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 1
        assert done.stderr.startswith("losa generate: error: ")

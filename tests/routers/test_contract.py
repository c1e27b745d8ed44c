"""What clients get through a router is what they get from the server itself, and routers learn what they ask for."""

from __future__ import annotations

import itertools
import json
import time

import httpx
import openai
import pytest
import sglang as sgl

from tests.routers.fleet import MODEL, SERVER_OPTIONS, Fleet, call, live
from tests.server.server_process import PATIENCE_S

pytestmark = pytest.mark.slow
QUESTION = "The secret code of the amber beetle is 8202.\n\nWhat is the secret code of the amber beetle?"
CHAT = [{"role": "user", "content": QUESTION}]


def client(fleet: Fleet) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0)


def test_the_router_knows_its_servers(fleet: Fleet) -> None:
    workers = fleet.workers()
    assert {worker["url"] for worker in workers} == {server.url for server in fleet.servers}
    for worker in workers:
        models = [model["id"] for model in worker.get("models", [{"id": worker["model_id"]}])]
        assert models == [MODEL] and worker["worker_type"] == "regular"
        facts = worker.get("labels") or worker["metadata"]
        assert facts["served_model_name"] == MODEL and "SDARForCausalLM" in facts["architectures"]
    if fleet.router.package == "smg":
        assert {worker["runtime_type"] for worker in workers} == {"sglang"}
        assert all(worker["labels"]["max_total_tokens"] == SERVER_OPTIONS[-1] for worker in workers)
    assert [model.id for model in client(fleet).models.list()] == [MODEL]
    assert fleet.http.get(f"{fleet.url}/get_model_info").json()["served_model_name"] == MODEL


def test_generate(fleet: Fleet) -> None:
    body = call(QUESTION, 24, rid="a-name", return_logprob=True)
    direct = fleet.http.post(f"{fleet.servers[0].url}/generate", json=body).json()
    routed = fleet.http.post(f"{fleet.url}/generate", json=body)
    assert routed.status_code == 200, routed.text
    answer = routed.json()
    assert (answer["text"], answer["output_ids"]) == (direct["text"], direct["output_ids"])
    assert answer["meta_info"]["id"] == "a-name" and len(answer["meta_info"]["output_token_logprobs"]) == 24


def test_a_batch_of_token_ids(fleet: Fleet) -> None:
    body = {"input_ids": [[300, 301, 302], [400, 401]], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    reply = fleet.http.post(f"{fleet.url}/generate", json=body)
    assert reply.status_code == 200, reply.text
    assert [answer["meta_info"]["prompt_tokens"] for answer in reply.json()] == [3, 2]


def test_streams_are_passed_on_unchanged(fleet: Fleet) -> None:
    body = call("The secret code", 40, stream=True)

    def events(url: str) -> list[str]:
        with fleet.http.stream("POST", f"{url}/generate", json=body) as reply:
            assert reply.status_code == 200
            return [line.removeprefix("data: ") for line in reply.iter_lines() if line]

    direct, routed = events(fleet.servers[0].url), events(fleet.url)
    assert direct[-1] == routed[-1] == "[DONE]"
    texts = [json.loads(event)["text"] for event in routed[:-1]]
    assert texts[-1] == json.loads(direct[-2])["text"] and len(texts) > 1
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))


def test_custom_params(fleet: Fleet) -> None:
    """smg passes them on; the older router drops them, so there servers' defaults are all there is in /generate."""
    custom = {"algorithm": "low_confidence_static", "denoising_steps": 2}
    meta = fleet.generate(QUESTION, 32, custom_params=custom).json()["meta_info"]
    assert (meta["denoise_steps"] <= 6) == fleet.router.keeps_custom
    body = {"model": MODEL, "prompt": QUESTION, "max_tokens": 32, "return_meta_info": True, **custom}
    choice = fleet.http.post(f"{fleet.url}/v1/completions", json={**body, "ignore_eos": True}).json()["choices"][0]
    assert choice["meta_info"]["denoise_steps"] <= 6, "completions carry them with both"


def test_openai(fleet: Fleet) -> None:
    ai = client(fleet)
    reply = ai.chat.completions.create(model=MODEL, messages=CHAT, temperature=0, max_tokens=16)  # type: ignore[arg-type]
    assert (reply.choices[0].message.content or "").startswith("8202")
    chunks = list(
        ai.chat.completions.create(
            model=MODEL,
            messages=CHAT,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == reply.choices[0].message.content
    assert chunks[-1].usage is not None and reply.usage is not None
    assert chunks[-1].usage.completion_tokens == reply.usage.completion_tokens
    assert ai.completions.create(model=MODEL, prompt="The secret", max_tokens=4).choices[0].text


def test_a_program_of_the_frontend(fleet: Fleet) -> None:
    @sgl.function
    def program(s: sgl.ProgramState) -> None:
        s += sgl.user(QUESTION)
        s += sgl.assistant(sgl.gen("answer", max_tokens=16, temperature=0))

    state = program.run(backend=sgl.RuntimeEndpoint(fleet.url, chat_template_name="chatml"))
    assert state["answer"].startswith("8202")


def test_a_prefix_finds_the_server_that_has_it(fleet: Fleet) -> None:
    documents = [f"{number} " + "The secret code of the red fox is 1234. " * 12 for number in range(4)]
    for document in documents:
        assert fleet.generate(document).status_code == 200
    for document in documents:
        meta = fleet.generate(f"{document} And now?").json()["meta_info"]
        assert meta["cached_tokens"] >= 0.8 * meta["prompt_tokens"]
    flushed = fleet.http.post(f"{fleet.url}/flush_cache")
    assert flushed.status_code == 200, flushed.text
    assert fleet.generate(documents[0]).json()["meta_info"]["cached_tokens"] == 0


def test_refusals_pass_through_and_are_not_tried_again(fleet: Fleet) -> None:
    began = time.monotonic()
    reply = fleet.generate("x", sampling_params={"top_p": 7})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "sampling_params.top_p"
    assert time.monotonic() - began < 20


def test_who_leaves_the_router_leaves_the_server(fleet: Fleet) -> None:
    with fleet.http.stream("POST", f"{fleet.url}/generate", json=call("the fox", 8000, stream=True)) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert sum(map(live, fleet.servers)) == 1
    deadline = time.monotonic() + PATIENCE_S / 4
    while sum(map(live, fleet.servers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sum(map(live, fleet.servers)) == 0


def test_loads_and_metrics(fleet: Fleet) -> None:
    loads = fleet.http.get(f"{fleet.url}/get_loads").json()
    found = loads.get("workers") or loads["loads"]
    assert {load["worker"] for load in found} == {server.url for server in fleet.servers}
    metrics = fleet.http.get(f"{fleet.url}/engine_metrics").text
    for server in fleet.servers:
        lines = [line for line in metrics.splitlines() if "num_running_reqs{" in line and server.url in line]
        assert len(lines) == 1 and httpx.URL(server.url).port is not None

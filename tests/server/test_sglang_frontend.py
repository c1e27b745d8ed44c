"""SGLang's own frontend, unchanged, against the HTTP application with the echo engine behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sglang as sgl

from tests.server.app_server import AppServer

METHODS = [sgl.token_length_normalized, sgl.greedy_token_selection, sgl.unconditional_likelihood_normalized]


@pytest.fixture
def endpoint(server: AppServer) -> Iterator[Any]:
    backend = sgl.RuntimeEndpoint(server.url)
    sgl.set_default_backend(backend)
    yield backend
    sgl.set_default_backend(None)


@sgl.function
def completion(s: Any, prompt: str, tokens: int = 6) -> None:
    s += prompt + sgl.gen("answer", max_tokens=tokens, temperature=0)


@sgl.function
def forks(s: Any) -> None:
    s += "the red fox and "
    s.sync()
    branches = s.fork(3)
    for i, branch in enumerate(branches):
        branch += f"number {i}" + sgl.gen("part", max_tokens=4)
    s += " ".join(branch["part"] for branch in branches)
    s += sgl.gen("end", max_tokens=2)


@sgl.function
def join_by_concatenation(s: Any) -> None:
    s += "the red fox "
    branches = s.fork(2)
    for i, branch in enumerate(branches):
        branch += f"number {i}"
    branches.join("concate_and_append")
    s += sgl.gen("end", max_tokens=2)


@sgl.function
def choose(s: Any, prompt: str, choices: list[str], method: Any) -> None:
    s += prompt + sgl.select("choice", choices=choices, choices_method=method)


def test_facts(endpoint: Any, bundled: str) -> None:
    assert endpoint.get_model_name() == bundled
    assert endpoint.get_server_info()["internal_states"]
    endpoint.flush_cache()


def test_gen(endpoint: Any) -> None:
    state = completion.run("the red fox")
    assert state["answer"].startswith("the red fox")
    assert state.get_meta_info("answer")["completion_tokens"] == 6


def test_gen_with_logprobs(endpoint: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "the red fox" + sgl.gen(
            "answer", max_tokens=3, return_logprob=True, logprob_start_len=1, return_text_in_logprobs=True
        )

    meta = program.run().get_meta_info("answer")
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"] - 1
    assert len(meta["output_token_logprobs"]) == 3


def test_stream(endpoint: Any) -> None:
    state = completion.run("the red fox über ", tokens=16, stream=True)
    assert "".join(state.text_iter("answer")) == state["answer"]


def test_fork(endpoint: Any, server: AppServer) -> None:
    state = forks.run()
    assert state.error() is None
    assert state["end"]
    assert any(r.sampling.max_new_tokens == 0 for r in server.engine.seen[-20:])


def test_concatenate_and_append(endpoint: Any) -> None:
    state = join_by_concatenation.run()
    assert state.error() is None
    assert state["end"]


def test_run_batch(endpoint: Any) -> None:
    prompt = "the quiet fox walked along the river to Halden and watched the gulls, and then it slept. "
    states = completion.run_batch([{"prompt": f"{prompt}{i}"} for i in range(24)], num_threads=8)
    assert [s.error() for s in states] == [None] * 24
    assert all(s["answer"].startswith("the") for s in states)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("prompt", ["", "the", "the fox is red and the hen is blue. the fox is"])
def test_select(endpoint: Any, method: Any, prompt: str) -> None:
    # The echo engine finds a token likely that came before.
    choices = [" green", " red", " yellow"]
    state = choose.run(prompt, choices, method)
    assert state.error() is None
    if prompt.startswith("the fox") and "Unconditional" not in type(method).__name__:
        assert state["choice"] == " red"


def test_select_scores_only_the_choice(endpoint: Any, server: AppServer) -> None:
    prompt = "the fox is red and the hen is blue. the fox is"
    state = choose.run(prompt, [" red fox", " blue"], sgl.token_length_normalized)
    entries = state.get_meta_info("choice")["input_token_logprobs"]
    assert ["".join(text for _, _, text in option) for option in entries] == [" red fox", " blue"]


def test_a_key(bundled: str) -> None:
    with AppServer(bundled, api_key="open-sesame") as server:
        with pytest.raises(Exception, match="401"):
            sgl.RuntimeEndpoint(server.url)
        backend = sgl.RuntimeEndpoint(server.url, api_key="open-sesame")
        assert completion.run("the red fox", backend=backend)["answer"].startswith("the red fox")
        assert "".join(completion.run("the red fox", backend=backend, stream=True).text_iter("answer")).startswith(
            "the"
        )
        assert backend.get_server_info()["internal_states"]


def test_an_error_reaches_the_program(endpoint: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "the fox" + sgl.gen("answer", temperature=-1.0)

    error = program.run().error()
    assert error is not None
    assert "sampling_params.temperature" in str(error)

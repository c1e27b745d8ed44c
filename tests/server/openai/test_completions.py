"""/v1/completions with OpenAI's own client; the echo engine answers with the prompt, four tokens per step."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from losa_runtime.tokenizer import Tokenizer
from losa_server.errors import RequestFailed
from tests.server.app_server import AppServer
from tests.server.openai.conftest import client_of

PROMPT = "the red fox walked along the river"
MODEL = "default"


def complete(client: openai.OpenAI, **wishes: Any) -> Any:
    return client.completions.create(**{"model": MODEL, "prompt": PROMPT, "max_tokens": 9, **wishes})


def chunks(client: openai.OpenAI, **wishes: Any) -> list[Any]:
    return list(complete(client, stream=True, **wishes))


def text_of(found: list[Any], index: int = 0) -> str:
    return "".join(c.choices[0].text for c in found if c.choices and c.choices[0].index == index)


def test_plain(client: openai.OpenAI, bundled: str) -> None:
    tokens = Tokenizer(bundled).encode(PROMPT)
    answer = complete(client, max_tokens=len(tokens))
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs, choice.index) == (PROMPT, "length", None, 0)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    usage = answer.usage
    assert usage.prompt_tokens == usage.completion_tokens == len(tokens) and usage.total_tokens == 2 * len(tokens)
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_sixteen_tokens_unless_said_otherwise(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT)
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    assert complete(client, max_tokens=0).choices[0].text == ""


def test_a_stream_is_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    found = chunks(client, prompt="SLOW fox", max_tokens=18)
    assert text_of(found) == complete(client, prompt="SLOW fox", max_tokens=18).choices[0].text
    assert len(found) > 1 and [c.choices[0].finish_reason for c in found] == [None] * (len(found) - 1) + ["length"]
    assert len({c.id for c in found}) == 1 and all(c.usage is None for c in found)


@pytest.mark.parametrize("continuous", [False, True])
def test_usage_in_a_stream_when_asked_for(client: openai.OpenAI, continuous: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    *found, last = chunks(client, stream_options=options)
    assert last.choices == [] and last.usage.completion_tokens == 9
    counts = [c.usage and c.usage.completion_tokens for c in found]
    if continuous:
        assert counts == sorted(counts) and set(counts) <= {4, 8, 9} and counts[-1] == 9
    else:
        assert not any(counts)


def test_several_prompts_and_samples(client: openai.OpenAI) -> None:
    answer = complete(client, prompt=["red", "fox"], n=2, max_tokens=2, seed=3)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    texts = [c.text for c in answer.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens == len(tokenizer_of(client).encode("red")) + len(
        tokenizer_of(client).encode("fox")
    )
    found = chunks(client, prompt=["red", "fox"], n=2, max_tokens=2, stream_options={"include_usage": True})
    assert [text_of(found, i) for i in range(4)] == texts
    assert found[-1].usage == answer.usage


def tokenizer_of(client: openai.OpenAI) -> Tokenizer:
    return Tokenizer(client.models.list().data[0].root)  # type: ignore[attr-defined]


def test_each_sample_has_a_seed_of_its_own(client: openai.OpenAI, server: AppServer) -> None:
    complete(client, n=2, seed=-1, extra_body={"rid": "seeds"})
    assert [r.sampling.sampling_seed for r in server.engine.seen[-2:]] == [2**63 - 1, 0]


@pytest.mark.parametrize("prompt", [[70, 80], [[70, 80]], [[70, 80], [90]]])
def test_token_ids(client: openai.OpenAI, prompt: Any, server: AppServer) -> None:
    complete(client, prompt=prompt)
    rows = prompt if isinstance(prompt[0], list) else [prompt]
    assert [list(r.prompt_ids) for r in server.engine.seen[-len(rows) :]] == rows


def test_stop_strings(client: openai.OpenAI) -> None:
    choice = complete(client, stop=[" fox", "river"], max_tokens=30).choices[0]
    assert (choice.text, choice.finish_reason, choice.matched_stop) == ("the red", "stop", " fox")
    assert text_of(chunks(client, stop=" fox", max_tokens=30)) == "the red"


def test_echo(client: openai.OpenAI) -> None:
    plain = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == PROMPT + plain
    assert text_of(chunks(client, echo=True)) == PROMPT + plain
    ids = tokenizer_of(client).encode("<|im_start|>fox")
    assert complete(client, prompt=ids, echo=True, max_tokens=0).choices[0].text == "<|im_start|>fox"


def test_logprobs(client: openai.OpenAI) -> None:
    logprobs = complete(client, logprobs=2).choices[0].logprobs
    assert logprobs.token_logprobs == [-0.5] * 9
    assert "".join(logprobs.tokens) == complete(client).choices[0].text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(9)]
    assert all(len(row) == 2 and row[t] == -0.5 for row, t in zip(logprobs.top_logprobs, logprobs.tokens, strict=True))
    assert complete(client, logprobs=0).choices[0].logprobs.top_logprobs is None


def test_logprobs_in_a_stream(client: openai.OpenAI) -> None:
    whole = complete(client, logprobs=1).choices[0].logprobs
    parts = [c.choices[0].logprobs for c in chunks(client, logprobs=1)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for part in parts for x in getattr(part, name)] == getattr(whole, name)


def test_a_character_of_several_tokens_moves_the_offset_once(client: openai.OpenAI) -> None:
    ids = tokenizer_of(client).encode("a漢b")
    assert len(ids) > 3
    logprobs = complete(client, prompt=ids, max_tokens=len(ids), logprobs=0).choices[0].logprobs
    assert logprobs.text_offset == [0] + [1] * (len(ids) - 2) + [2]
    assert "�" in "".join(logprobs.tokens)


def test_scoring_by_echo(client: openai.OpenAI) -> None:
    """What evaluation harnesses do: the prompt's own log-probabilities, and whether each token is the likeliest."""
    answer = complete(client, echo=True, max_tokens=1, logprobs=1, temperature=0)
    logprobs, n = answer.choices[0].logprobs, answer.usage.prompt_tokens
    assert len(logprobs.tokens) == n + 1 == len(logprobs.top_logprobs)
    assert "".join(logprobs.tokens[:n]) == PROMPT
    assert all(-3 < value < 0 for value in logprobs.token_logprobs)
    assert logprobs.text_offset[n] == len(PROMPT)
    only = complete(client, echo=True, max_tokens=0, logprobs=1)
    assert only.choices[0].text == PROMPT and only.choices[0].logprobs.tokens == logprobs.tokens[:n]
    assert only.choices[0].logprobs.token_logprobs == logprobs.token_logprobs[:n]


def test_too_much_to_score_is_told_of_echo(bundled: str) -> None:
    with AppServer(bundled, max_score_tokens=3) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="4 prompt tokens to score") as caught:
            complete(client, prompt=[70, 71, 72, 73], echo=True, logprobs=0)
        assert caught.value.param == "echo"
        assert complete(client, prompt=[70, 71, 72], echo=True, logprobs=0).choices


def test_samples_of_a_prompt_are_tokenized_once(
    client: openai.OpenAI, server: AppServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    encode = server.manager.tokenizer.encode
    monkeypatch.setattr(server.manager.tokenizer, "encode", lambda text: [seen.append(text), encode(text)][1])
    complete(client, prompt=["fox", "hen"], n=3)
    assert sorted(seen) == ["fox", "hen"]


def test_everything_reaches_the_engine(client: openai.OpenAI, server: AppServer) -> None:
    complete(
        client, temperature=0.5, top_p=0.9, frequency_penalty=0.1, presence_penalty=0.2, logit_bias={"70": -1}, seed=5,
        stop="x", user="me", best_of=1,
        extra_body={
            "top_k": 7, "min_p": 0.1, "min_tokens": 3, "repetition_penalty": 1.1, "ignore_eos": True,
            "stop_token_ids": [4], "no_stop_trim": True, "skip_special_tokens": False, "priority": 0,
            "cache_salt": "s", "custom_params": {"token_budget": 32, "threshold": 0.5}, "token_budget": 64,
            "sparse_method": "losa", "active_tokens": 4, "algorithm": "low_confidence_dynamic", "denoising_steps": 4,
            "rid": "mine", "log_metrics": True, "unheard_of": [1],
        },
    )  # fmt: skip
    request = server.engine.seen[-1]
    params = request.sampling
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (params.max_new_tokens, params.min_new_tokens, params.sampling_seed) == (9, 3, 5)
    assert (params.logit_bias, params.stop, params.stop_token_ids) == ({70: -1.0}, ("x",), (4,))
    assert (params.ignore_eos, params.no_stop_trim, params.skip_special_tokens) == (True, True, False)
    custom = params.custom_params
    assert (custom.token_budget, custom.threshold, custom.sparse_method) == (64, 0.5, "losa")
    assert (custom.active_tokens, custom.algorithm, custom.denoising_steps) == (4, "low_confidence_dynamic", 4)
    assert request.namespace == "0:s"


@pytest.mark.parametrize(
    ("wish", "schema"),
    [
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}},
            {"type": "null"},
        ),
        ({"json_schema": '{"type": "null"}'}, {"type": "null"}),
        ({"response_format": {"type": "text"}}, None),
    ],
)
def test_constraints_reach_the_engine(
    client: openai.OpenAI, server: AppServer, wish: dict[str, Any], schema: Any
) -> None:
    complete(client, extra_body=wish)
    given = server.engine.seen[-1].sampling.json_schema
    assert (given and json.loads(given)) == schema
    complete(client, extra_body={"regex": "a+"})
    assert server.engine.seen[-1].sampling.regex == "a+"


def test_sglangs_extras(client: openai.OpenAI) -> None:
    extra = {"return_meta_info": True, "return_prompt_token_ids": True, "rid": "mine"}
    answer = complete(client, extra_body=extra)
    assert answer.id == "mine"
    assert answer.choices[0].meta_info["denoise_steps"] == 3
    assert answer.choices[0].prompt_token_ids == tokenizer_of(client).encode(PROMPT)
    assert chunks(client, extra_body=extra)[-1].choices[0].meta_info["kv_density"] == 0.25


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt.1"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "9"}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"prompt": ["a"] * 100, "n": 100}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"seed": "x"}, "seed"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"echo": True, "logprobs": 1, "stream": True}, "stream"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"stream_options": {"include_usage": 1}}, "include_usage"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"stop": 5}, "stop"),
    ({"min_tokens": 10}, "min_tokens"),
    ({"response_format": {"type": "json_object"}, "regex": "a"}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": "json"}, "response_format"),
    ({"regex": 5}, "regex"),
    ({"ebnf": "root ::= 'a'"}, "ebnf"),
    ({"json_schema": 5}, "json_schema"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
    ({"stop_regex": ["a"]}, "stop_regex"),
    ({"lora_path": "x"}, "lora_path"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"custom_params": 5}, "custom_params"),
    ({"custom_params": {"no_such": 1}}, "custom_params.no_such"),
    ({"custom_params": {"token_budget": -1}}, "custom_params.token_budget"),
    ({"token_budget": -1}, "token_budget"),
    ({"threshold": 2}, "threshold"),
    ({"custom_params": {"trace": True}}, "custom_params.trace"),
    ({"active_tokens": 1, "active_ratio": 0.5}, "active_ratio"),
    ({"max_tokens": 10**6}, "prompt"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"return_meta_info": 1}, "return_meta_info"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "param"), BAD, ids=[f"{i}-{p}" for i, (_, p) in enumerate(BAD)])
def test_what_cannot_be_honoured_is_refused_by_name(
    client: openai.OpenAI, body: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body={"prompt": PROMPT, "max_tokens": 9, "stream": stream, **body}, cast_to=object)
    assert caught.value.param == param
    assert param in caught.value.message and caught.value.type == "invalid_request_error"


def test_neutral_values_are_fine(client: openai.OpenAI) -> None:
    names = (
        "suffix best_of logprobs regex stream_options lora_path temperature max_tokens logit_bias stop user rid model "
        "session_params json_schema stop_regex custom_params top_k token_budget"
    )
    nothing: dict[str, Any] = dict.fromkeys(names.split())
    nothing |= {"response_format": {"type": "text"}, "echo": False, "return_hidden_states": False, "stop_regex": []}
    nothing |= {"spaces_between_special_tokens": True, "background": False, "no_logs": False}
    answer: Any = client.post("/completions", body={"prompt": PROMPT, **nothing}, cast_to=object)
    assert answer["usage"]["completion_tokens"] == 16


def test_a_failure_in_mid_stream_is_an_event(client: openai.OpenAI, server: AppServer) -> None:
    async def fail_all() -> None:
        server.client.fail_all(RequestFailed(500, "the engine is gone"))

    stream = complete(client, prompt="SLOW fox", max_tokens=4000, stream=True)
    assert next(stream).choices[0].text
    server.call(fail_all())
    with pytest.raises(openai.APIError, match="the engine is gone"):
        list(stream)


def test_events_are_lines_of_data(server: AppServer) -> None:
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={"prompt": PROMPT, "stream": True, "max_tokens": 5}, timeout=20
    ) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all("choices" in json.loads(line.removeprefix("data: ")) for line in lines[:-1])

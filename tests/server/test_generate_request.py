"""The body of /generate as a pure function: what each field means, and which field an error names."""

from __future__ import annotations

from typing import Any

import pytest

from losa_runtime.core.errors import InvalidRequest
from losa_server.http.generate_request import parse_generate

SELECT = {
    "sampling_params": {"max_new_tokens": 0, "temperature": 0},
    "return_logprob": True,
    "return_text_in_logprobs": True,
}


def parse(**body: Any) -> Any:
    return parse_generate(body, 64)


def test_plain_text() -> None:
    call = parse(text="hi", sampling_params={"max_new_tokens": 3, "stop": [], "stop_token_ids": []}, unheard_of=1)
    assert [a.prompt for a in call.asks] == ["hi"]
    assert not call.as_list
    assert not call.stream
    assert call.asks[0].sampling.max_new_tokens == 3
    assert call.asks[0].score_start is None


def test_lists_and_params_per_prompt() -> None:
    call = parse(
        input_ids=[[1, 2], [3]], sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2}], rid=["a", "b"]
    )
    assert [(a.prompt, a.sampling.max_new_tokens, a.label) for a in call.asks] == [((1, 2), 1, "a"), ((3,), 2, "b")]
    assert call.as_list
    assert parse(text=["only"]).as_list
    assert [a.label for a in parse(text=["x", "y"], rid="r").asks] == ["r_0", "r_1"]


def test_n_repeats_each_prompt_with_seeds_of_their_own() -> None:
    call = parse(text=["a", "b"], sampling_params={"n": 2, "sampling_seed": 5})
    assert [(a.prompt, a.sampling.sampling_seed, a.sampling.n) for a in call.asks] == [
        ("a", 5, 1), ("a", 6, 1), ("b", 5, 1), ("b", 6, 1)
    ]  # fmt: skip
    assert parse(text="a", sampling_params={"n": 2}).as_list


def test_unknown_sampling_keys_are_dropped_and_nulls_mean_default() -> None:
    params: dict[str, Any] = {
        "spaces_between_special_tokens": None,
        "top_k": None,
        "regex": None,
        "stop_regex": [],
        "block_size": 4,
    }
    assert parse(text="a", sampling_params=params).asks[0].sampling.top_k == -1
    assert parse(text="a", sampling_params=None).asks[0].sampling.max_new_tokens == 128


def test_custom_params_may_stand_at_the_top() -> None:
    call = parse(
        text="a",
        custom_params={"sparse_method": "losa", "token_budget": 64},
        sampling_params={"custom_params": {"token_budget": 32}},
    )
    custom = call.asks[0].sampling.custom_params
    assert (custom.sparse_method, custom.token_budget) == ("losa", 32)


NOTHING = {"max_new_tokens": 0}


@pytest.mark.parametrize(
    ("body", "start"),
    [
        ({"text": "abc", "return_logprob": True, "logprob_start_len": 2}, 2),
        ({"text": "abc", "return_logprob": True, "logprob_start_len": 0}, 0),
        ({"text": "abc", "return_logprob": True, "logprob_start_len": -1}, None),
        ({"text": "abc", "return_logprob": True}, None),
        ({"text": "abc", "return_logprob": True, "logprob_start_len": [None]}, None),
        ({"text": "abc", "return_logprob": True, "sampling_params": {"max_new_tokens": 0}}, 0),
        ({"text": "abc", "return_logprob": True, "logprob_start_len": None, "sampling_params": NOTHING}, 0),
        ({"text": "abc", "return_logprob": True, "logprob_start_len": -1, "sampling_params": NOTHING}, None),
        ({"text": "abc", "return_logprob": False, "logprob_start_len": 2}, None),
        ({"input_ids": [[1, 2]], "return_logprob": True, "sampling_params": {"max_new_tokens": 0}}, 0),
        ({"text": ["abc"], "logprob_start_len": 3, **SELECT}, 4),
        ({"text": ["abc"], "logprob_start_len": 0, **SELECT}, 0),
        ({"text": "abc", "logprob_start_len": 3, **SELECT}, 3),
        ({"input_ids": [[1, 2, 3, 4]], "logprob_start_len": 3, **SELECT}, 3),
        ({"text": ["abc"], "logprob_start_len": 3, **SELECT, "return_text_in_logprobs": False}, 3),
    ],
)  # fmt: skip
def test_where_prompt_logprobs_start(body: dict[str, Any], start: int | None) -> None:
    assert parse_generate(body, 64).asks[0].score_start == start


def test_namespaces_keep_key_and_salt_apart() -> None:
    names = {parse(text="a", extra_key=k, cache_salt=s).asks[0].namespace for k, s in
             [(None, None), ("ab", ""), ("a", "b"), ("", "ab")]}  # fmt: skip
    assert len(names) == 4
    assert parse(text="a").asks[0].namespace == ""


def test_alternatives_per_prompt_count_only_where_logprobs_are_wanted() -> None:
    call = parse(
        text=["a", "b", "c"], return_logprob=[True, False, True], top_logprobs_num=[1, 2, 0],
        token_ids_logprob=[[0, 5], [6], None],
    )  # fmt: skip
    assert [(a.top_logprobs, a.logprob_ids) for a in call.asks] == [(1, (0, 5)), (0, ()), (0, ())]
    call = parse(text=["a", "b"], return_logprob=True, top_logprobs_num=3, token_ids_logprob=[0])
    assert [(a.top_logprobs, a.logprob_ids) for a in call.asks] == [(3, (0,))] * 2


def test_a_trace_is_for_streams_and_not_for_the_engines_parameters() -> None:
    call = parse(text="a", stream=True, sampling_params={"custom_params": {"trace": True, "token_budget": 32}})
    assert call.asks[0].trace and call.asks[0].sampling.custom_params.token_budget == 32
    assert not parse(text="a", sampling_params={"custom_params": {"trace": False}}).asks[0].trace
    with pytest.raises(InvalidRequest, match="with `stream` only"):
        parse(text="a", sampling_params={"custom_params": {"trace": True}})


def test_neutral_values_of_refused_fields_are_fine() -> None:
    call = parse(
        text="a", image_data=None, lora_path=None, return_hidden_states=False, return_routed_experts=False,
        top_logprobs_num=[None], token_ids_logprob=[], session_params={}, model="unknown", log_metrics=True,
    )  # fmt: skip
    assert len(call.asks) == 1


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "text"),
    ({"text": None}, "text"),
    ({"text": 5}, "text"),
    ({"text": []}, "text"),
    ({"text": ["a", 1]}, "text"),
    ({"text": "a", "input_ids": [1]}, "input_ids"),
    ({"input_ids": "abc"}, "input_ids"),
    ({"input_ids": [1.5]}, "input_ids"),
    ({"input_ids": [True]}, "input_ids"),
    ({"input_ids": [[1], 2]}, "input_ids"),
    ({"text": "a", "sampling_params": 3}, "sampling_params"),
    ({"text": "a", "sampling_params": [{}, {}]}, "sampling_params"),
    ({"text": "a", "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
    ({"text": "a", "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
    ({"text": "a", "sampling_params": {"top_p": 0}}, "sampling_params.top_p"),
    ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
    ({"text": "a", "sampling_params": {"n": 0}}, "sampling_params.n"),
    ({"text": ["a"] * 40, "sampling_params": {"n": 2}}, "sampling_params.n"),
    ({"text": ["a"] * 65}, "text"),
    ({"text": "a", "sampling_params": {"regex": 5}}, "sampling_params.regex"),
    ({"text": "a", "sampling_params": {"json_schema": []}}, "sampling_params.json_schema"),
    ({"text": "a", "sampling_params": {"stop_regex": ["a"]}}, "sampling_params.stop_regex"),
    ({"text": "a", "sampling_params": {"custom_params": {"no_such": 1}}}, "sampling_params.custom_params.no_such"),
    ({"text": "a", "sampling_params": {"custom_params": 1}}, "sampling_params.custom_params"),
    ({"text": "a", "custom_params": []}, "custom_params"),
    ({"text": ["a", "b"], "sampling_params": [{}, {"top_k": 0}]}, "sampling_params.1.top_k"),
    ({"text": "a", "image_data": "xyz"}, "image_data"),
    ({"text": "a", "lora_path": "x"}, "lora_path"),
    ({"text": "a", "custom_logit_processor": "x"}, "custom_logit_processor"),
    ({"text": "a", "return_hidden_states": True}, "return_hidden_states"),
    ({"text": "a", "top_logprobs_num": 129}, "top_logprobs_num"),
    ({"text": "a", "top_logprobs_num": -1}, "top_logprobs_num"),
    ({"text": "a", "top_logprobs_num": "2"}, "top_logprobs_num"),
    ({"text": "a", "token_ids_logprob": [-3]}, "token_ids_logprob"),
    ({"text": "a", "token_ids_logprob": 3}, "token_ids_logprob"),
    ({"text": "a", "token_ids_logprob": [[3], [4]]}, "token_ids_logprob"),
    ({"text": "a", "token_ids_logprob": [[3, None]]}, "token_ids_logprob"),
    ({"text": "a", "token_ids_logprob": list(range(129))}, "token_ids_logprob"),
    ({"text": "a", "return_prompt_token_ids": 1}, "return_prompt_token_ids"),
    ({"text": "a", "custom_params": {"trace": 1}}, "sampling_params.custom_params.trace"),
    ({"text": "a", "session_params": {"id": "1"}}, "session_params"),
    ({"text": "a", "stream": 1}, "stream"),
    ({"text": "a", "stream": "true"}, "stream"),
    ({"text": "a", "return_logprob": 1}, "return_logprob"),
    ({"text": "a", "logprob_start_len": -2}, "logprob_start_len"),
    ({"text": "a", "logprob_start_len": "1"}, "logprob_start_len"),
    ({"text": "a", "logprob_start_len": [1, 2]}, "logprob_start_len"),
    ({"text": "a", "return_text_in_logprobs": "yes"}, "return_text_in_logprobs"),
    ({"text": "a", "rid": 5}, "rid"),
    ({"text": "a", "priority": "high"}, "priority"),
    ({"text": "a", "extra_key": 5}, "extra_key"),
    ({"text": "a", "cache_salt": ["a", "b"]}, "cache_salt"),
]


@pytest.mark.parametrize(("body", "field"), BAD, ids=[f"{i}-{f}" for i, (_, f) in enumerate(BAD)])
def test_bad_bodies_name_their_field(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_generate(body, 64)
    assert caught.value.field == field

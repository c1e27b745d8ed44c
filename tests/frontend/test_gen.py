"""`gen` with every argument that it has: what each of them does to an answer that is known."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import pytest
import sglang as sgl

from tests.frontend.world import FIRST, KEYS, answer, codes, plain, prompt, questions, refusal, token_id

pytestmark = pytest.mark.slow

CODE = FIRST.answer


@pytest.mark.parametrize("task", ["multi_key", "variable", "multi_value", "multi_query"])
def test_the_answers_are_right(task: str) -> None:
    question = questions(task)[0]
    text, meta = answer(question)
    assert text == question.answer
    assert meta["finish_reason"]["type"] == "stop"
    assert meta["completion_tokens"] > len(codes(text)) * 4


def test_max_tokens_cuts_inside_a_block() -> None:
    text, meta = answer(max_tokens=2)
    assert text == CODE[:2]
    assert meta["finish_reason"] == {"type": "length", "length": 2}
    assert meta["completion_tokens"] == 2


def test_min_tokens_postpones_the_end() -> None:
    text, meta = answer(min_tokens=12)
    assert text.startswith(CODE)
    assert len(text) > len(CODE)
    assert meta["completion_tokens"] >= 12


def test_ignore_eos_goes_on_to_max_tokens() -> None:
    text, meta = answer(ignore_eos=True, max_tokens=24)
    assert text.startswith(CODE)
    assert meta["completion_tokens"] == 24
    assert meta["finish_reason"] == {"type": "length", "length": 24}


def test_a_stop_string_is_cut_off() -> None:
    text, meta = answer(stop=CODE[2])
    assert text == CODE[:2]
    assert meta["finish_reason"] == {"type": "stop", "matched": CODE[2]}


def test_the_first_of_several_stops_wins() -> None:
    text, meta = answer(stop=["never", CODE[3], CODE[1:3]])
    assert text == CODE[0]
    assert meta["finish_reason"]["matched"] == CODE[1:3]


def test_a_stop_string_across_a_block_border() -> None:
    tried = 0
    for question in (*questions("multi_value"), *questions("multi_query")):
        whole, meta = answer(question, return_logprob=True, return_text_in_logprobs=True)
        pieces = [piece for _, _, piece in meta["output_token_logprobs"]]
        border = 16 - meta["prompt_tokens"] % 16  # tokens of the answer in the block that the prompt has begun
        stop = "".join(pieces[border - 1 : border + 1])
        before = "".join(pieces[: border - 1])
        if len(stop) < 2 or border < 2 or whole.find(stop) != len(before):
            continue
        tried += 1
        text, meta = answer(question, stop=stop)
        assert (text, meta["finish_reason"]) == (before, {"type": "stop", "matched": stop})
    assert tried


def test_stop_token_ids(url: str) -> None:
    last = token_id(url, CODE[3])
    text, meta = answer(stop_token_ids=[last])
    assert text.startswith(CODE[:3])
    assert len(text) <= len(CODE)
    assert meta["finish_reason"] == {"type": "stop", "matched": last}
    assert meta["completion_tokens"] == 4


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}], ids=str)
def test_filters_that_leave_one_token_are_greedy(options: dict[str, float]) -> None:
    text, _ = answer(temperature=1.0, **options)
    assert text == CODE


def test_temperature() -> None:
    assert answer(temperature=0.01)[0] == CODE
    assert answer(temperature=100.0)[0] != CODE


def test_a_filter_holds_at_any_temperature() -> None:
    assert answer(temperature=100.0, top_k=1)[0] == CODE


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_penalties_change_what_is_repeated(name: str) -> None:
    def different_tokens(penalty: float) -> int:
        _, meta = answer(ignore_eos=True, max_tokens=48, return_logprob=True, **{name: penalty})
        return len({token for _, token, _ in meta["output_token_logprobs"]})

    assert different_tokens(2.0) > different_tokens(0.0)


def test_logprobs_of_the_output() -> None:
    text, meta = answer(return_logprob=True, return_text_in_logprobs=True)
    entries = meta["output_token_logprobs"]
    assert len(entries) == meta["completion_tokens"]
    assert "".join(piece for _, _, piece in entries[:4]) == text == CODE
    assert all(-0.1 < value < 0 for value, _, _ in entries)  # the model is sure, and no value is exactly 0


def test_logprobs_of_other_tokens() -> None:
    _, meta = answer(return_logprob=True, top_logprobs_num=2)
    for (value, token, _), others in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert [token, value] == [
            others[0][1],
            pytest.approx(others[0][0], abs=1e-3),
        ]  # greedy: the likeliest was taken
        assert others[1][0] < others[0][0]
        assert len(others) == 2


def test_logprobs_of_the_prompt() -> None:
    _, meta = answer(return_logprob=True, return_text_in_logprobs=True, logprob_start_len=600)
    entries = meta["input_token_logprobs"]
    assert len(entries) == meta["prompt_tokens"] - 600
    assert "".join(piece for _, _, piece in entries).endswith(f"\n\n{FIRST.text}<|im_end|>\n<|im_start|>assistant\n")
    assert all(value < 0 for value, _, _ in entries)


def test_no_text_in_logprobs_unless_asked() -> None:
    _, meta = answer(return_logprob=True)
    assert [piece for _, _, piece in meta["output_token_logprobs"]] == [None] * meta["completion_tokens"]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"dtype": int}, re.escape(CODE)),
        ({"dtype": float}, re.escape(CODE)),
        ({"dtype": str}, r'"[\w\s]*"'),
        ({"dtype": bool}, "True|False"),
        ({"regex": r"[0-9]{4}"}, re.escape(CODE)),
        ({"regex": r"[a-f]{3,5}!"}, r"[a-f]{3,5}!"),
        ({"json_schema": '{"type": "integer"}'}, "-?(0|[1-9][0-9]*)"),  # the code begins with 0: no JSON
    ],
    ids=str,
)
def test_constrained_output_matches_and_is_right_where_it_can_be(options: dict[str, object], wanted: str) -> None:
    text, _ = answer(**options)
    assert re.fullmatch(wanted, text)


def test_json_of_a_schema() -> None:
    schema = {"type": "object", "properties": {"code": {"type": "integer"}, "sure": {"type": "boolean"}}}
    text, meta = answer(json_schema=json.dumps(schema | {"required": ["code", "sure"]}), max_tokens=48)
    assert set(json.loads(text)) == {"code", "sure"}
    assert meta["finish_reason"]["type"] == "stop"


@pytest.mark.parametrize(
    ("gen", "wanted"), [(sgl.gen_int, CODE), (sgl.gen_string, None)], ids=["gen_int", "gen_string"]
)
def test_typed_gens(gen: Any, wanted: str | None) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += plain(FIRST) + gen("answer", max_tokens=12, temperature=0.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = program.run()["answer"]
    assert text == wanted if wanted else re.fullmatch(r'"[\w\s]*"', text)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"regex": "a(?=b)"}, "regex"),
        ({"regex": "(a)\\1"}, "regex"),
        ({"regex": "((a{1,99}){1,99}){1,99}"}, "regex"),
        ({"regex": "[0-9]{40}", "max_tokens": 3}, "max_new_tokens"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"json_schema": '{"type": "array", "uniqueItems": true}'}, "json_schema.uniqueItems"),
    ],
    ids=str,
)
def test_constraints_that_cannot_be_served_are_refused_by_name(options: dict[str, object], field: str) -> None:
    assert f"sampling_params.{field}" in refusal(**options)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"min_tokens": 40, "max_tokens": 8}, "min_new_tokens"),
        ({"presence_penalty": 9.0}, "presence_penalty"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ],
    ids=lambda value: str(value),
)
def test_values_out_of_range_are_refused_by_name(options: dict[str, object], field: str) -> None:
    assert field in refusal(**options)


def test_gen_without_a_name_is_only_text() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user(prompt(KEYS[1]))
        s += sgl.assistant(sgl.gen(max_tokens=16, temperature=0))

    state = program.run()
    assert state.error() is None
    assert state.text().endswith(f"assistant\n{KEYS[1].answer}<|im_end|>\n")


def test_gen_with_choices_is_select() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user(prompt(FIRST))
        s += sgl.assistant(sgl.gen("answer", choices=[q.answer for q in KEYS[:4]]))

    assert program.run()["answer"] == CODE

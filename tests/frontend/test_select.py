"""`select` with the three rules of choosing: the right fact wins, and only the choice itself is scored."""

from __future__ import annotations

from typing import Any

import pytest
import sglang as sgl

from tests.frontend.world import DOCUMENT, FIRST, KEYS, plain, prompt, questions

pytestmark = pytest.mark.slow

METHODS = [sgl.token_length_normalized, sgl.greedy_token_selection, sgl.unconditional_likelihood_normalized]
CHOICES = [question.answer for question in KEYS[:4]]


@sgl.function
def choose(s: Any, text: str, choices: list[str], method: Any) -> None:
    s += text
    s += sgl.select("choice", choices=choices, choices_method=method)


@pytest.fixture(params=METHODS, ids=lambda method: type(method).__name__)
def method(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_the_right_code_wins(method: Any) -> None:
    for question in KEYS[:4]:
        state = choose.run(plain(question), CHOICES, method)
        assert state["choice"] == question.answer
        assert state.text() == plain(question) + question.answer


def test_choices_of_different_length(method: Any) -> None:
    question = questions("multi_query")[0]
    one, two = question.answer.split(", ")
    choices = [f"{two}, {one}", question.answer, f"{one}, {one}, {two}", "0", "The fog of Corvale"]
    state = choose.run(plain(question), choices, method)
    assert state["choice"] == question.answer


def test_in_a_chat(method: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user(prompt(FIRST))
        s += sgl.assistant_begin()
        s += sgl.select("choice", choices=CHOICES, choices_method=method)
        s += sgl.assistant_end()

    state = program.run()
    assert state["choice"] == FIRST.answer
    assert state.messages()[-1] == {"role": "assistant", "content": FIRST.answer}


@pytest.mark.parametrize("text", ["", "The"], ids=["empty", "one token"])
def test_hardly_any_prompt(method: Any, text: str) -> None:
    """Prose of the model's language is likelier than prose of no language, whatever stands before it."""
    state = choose.run(text, [" fgq zzv xkw", " trumpet of the"], method)
    assert state.error() is None
    assert len(state.get_meta_info("choice")["input_token_logprobs"]) == 2
    if "Unconditional" not in type(method).__name__:
        assert state["choice"] == " trumpet of the"


def test_only_the_choice_is_scored() -> None:
    state = choose.run(plain(FIRST), CHOICES, sgl.token_length_normalized)
    meta = state.get_meta_info("choice")
    texts = ["".join(piece for _, _, piece in entries) for entries in meta["input_token_logprobs"]]
    assert texts == CHOICES
    means = [sum(value for value, _, _ in entries) / len(entries) for entries in meta["input_token_logprobs"]]
    assert meta["normalized_prompt_logprobs"] == pytest.approx(means)
    assert means[0] > -0.1 > -2 > max(means[1:])


def test_a_choice_may_be_used_further() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += f"{DOCUMENT.text}\n\nQuestion: "
        s += sgl.select("question", choices=[FIRST.text, "zq kx"])
        s += "\nAnswer: " + sgl.gen("answer", max_tokens=8, temperature=0)

    state = program.run()
    assert (state["question"], state["answer"].strip()) == (FIRST.text, FIRST.answer)


def test_scores_do_not_depend_on_the_cache(endpoint: Any) -> None:
    endpoint.flush_cache()
    cold = choose.run(plain(FIRST), CHOICES, sgl.token_length_normalized).get_meta_info("choice")
    warm = choose.run(plain(FIRST), CHOICES, sgl.token_length_normalized).get_meta_info("choice")
    assert warm["normalized_prompt_logprobs"] == pytest.approx(cold["normalized_prompt_logprobs"], abs=1e-3)

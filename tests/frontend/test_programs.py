"""What programs are made of besides `gen`: arguments, defaults, variables, scopes, sampling defaults of a run."""

from __future__ import annotations

from typing import Any

import pytest
import sglang as sgl

from tests.frontend.world import DOCUMENT, FIRST, KEYS, Question, plain

pytestmark = pytest.mark.slow


@sgl.function
def look_up(s: Any, document: str, question: Question = FIRST, lead: str = "Answer: ") -> None:
    s += f"{document}\n\nQuestion: {question.text}\n{lead}" + sgl.gen("answer", max_tokens=16, temperature=0)


def test_defaults_of_arguments() -> None:
    assert look_up.run(DOCUMENT.text)["answer"].strip() == FIRST.answer
    assert look_up.run(DOCUMENT.text, question=KEYS[1])["answer"].strip() == KEYS[1].answer


def test_bound_arguments() -> None:
    bound = look_up.bind(document=DOCUMENT.text)
    states = [bound.run(question=question) for question in KEYS[:2]]
    assert [state["answer"].strip() for state in states] == [question.answer for question in KEYS[:2]]


def test_calling_is_running() -> None:
    assert look_up(DOCUMENT.text)["answer"].strip() == FIRST.answer


def test_sampling_defaults_of_a_run() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += plain(FIRST)
        s += sgl.gen("free")
        s += "\nAgain: " + sgl.gen("own", max_tokens=3)

    state = program.run(max_new_tokens=2, temperature=0, ignore_eos=True)
    assert state["free"] == FIRST.answer[:2]
    assert state.get_meta_info("free")["completion_tokens"] == 2
    assert state.get_meta_info("own")["completion_tokens"] == 3


def test_stops_of_a_run() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += plain(FIRST) + sgl.gen("answer", temperature=0)

    assert program.run(stop=[FIRST.answer[2]], max_new_tokens=8)["answer"] == FIRST.answer[:2]


def test_an_answer_becomes_part_of_the_next_question() -> None:
    """Two codes are asked for one by one, then a question is chosen by what they are."""
    one, two = KEYS[:2]

    @sgl.function
    def program(s: Any) -> None:
        s += DOCUMENT.text
        found = {}
        for branch, question in zip(s.fork(2), (one, two), strict=True):
            branch += f"\n\nQuestion: {question.text}\nAnswer: " + sgl.gen("code", max_tokens=8, temperature=0)
            found[branch["code"].strip()] = question
        larger = found[max(found)]
        s += f"\n\nQuestion: {larger.text}\nAnswer: " + sgl.gen("again", max_tokens=8, temperature=0)

    state = program.run()
    assert state["again"].strip() == max(one.answer, two.answer)


def test_control_flow_on_an_answer() -> None:
    @sgl.function
    def program(s: Any, code: str) -> None:
        s += plain(FIRST) + sgl.gen("answer", max_tokens=8, temperature=0)
        s += " right" if s["answer"].strip() == code else " wrong"

    assert program.run(FIRST.answer).text().endswith(" right")
    assert program.run("0000").text().endswith(" wrong")


def test_scopes_of_variables() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += plain(FIRST)
        with s.var_scope("reply"):
            s += "It is " + sgl.gen("answer", max_tokens=8, temperature=0) + "."

    state = program.run()
    assert state["reply"] == f"It is {state['answer']}."
    assert "answer" in state
    assert "nothing" not in state


def test_variables_of_ones_own() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s["found"] = []
        s += DOCUMENT.text
        for i, question in enumerate(KEYS[:2]):
            s += f"\n\nQuestion: {question.text}\nAnswer: " + sgl.gen(f"a{i}", max_tokens=8, temperature=0)
            s["found"].append(s[f"a{i}"].strip())

    assert program.run()["found"] == [question.answer for question in KEYS[:2]]


def test_expressions_are_joined() -> None:
    @sgl.function
    def program(s: Any) -> None:
        gen = sgl.gen("answer", max_tokens=8, temperature=0)
        s += DOCUMENT.text + "\n\n" + "Question: " + FIRST.text + "\nAnswer: " + gen + "\nThanks."

    state = program.run()
    assert state["answer"].strip() == FIRST.answer
    assert state.text().endswith("\nThanks.")


def test_without_threads() -> None:
    state = look_up.run(DOCUMENT.text, use_thread=False)
    assert state["answer"].strip() == FIRST.answer

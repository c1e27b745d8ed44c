"""`fork`, `join`, `copy` and nested functions: branches share what was read and never mix what they say."""

from __future__ import annotations

from typing import Any

import pytest
import sglang as sgl

from tests.frontend.world import DOCUMENT, FIRST, KEYS, LONG, Question, plain, questions

pytestmark = pytest.mark.slow

GREEDY: dict[str, Any] = {"max_tokens": 16, "temperature": 0}


def question_line(question: Question) -> str:
    return f"\n\nQuestion: {question.text}\nAnswer: "


@pytest.mark.parametrize("synced", [True, False], ids=["read first", "at once"])
def test_one_branch_per_question(endpoint: Any, synced: bool) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += DOCUMENT.text
        if synced:  # otherwise fork may be reached before there is a text, and then the frontend sends nothing ahead
            s.sync()
        branches = s.fork(len(KEYS))
        for branch, question in zip(branches, KEYS, strict=True):
            branch += question_line(question) + sgl.gen("answer", **GREEDY)
        s.set_var("answers", [branch["answer"].strip() for branch in branches])
        s.set_var("cached", [branch.get_meta_info("answer")["cached_tokens"] for branch in branches])

    endpoint.flush_cache()
    state = program.run()
    assert state["answers"] == [question.answer for question in KEYS]
    # The document is read once: ahead of the branches, or by the first of them while the others wait.
    assert sorted(state["cached"])[0 if synced else 1] >= 560
    assert state.text() == DOCUMENT.text


def test_join_gathers_variables() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += DOCUMENT.text
        branches = s.fork(3)
        branches += lambda i: question_line(KEYS[i]) + sgl.gen("answer", **GREEDY)
        branches.join()
        s += "\n" + "; ".join(s["answer"])

    state = program.run()
    assert state["answer"] == [question.answer for question in KEYS[:3]]
    assert state.text().endswith("\n" + "; ".join(question.answer for question in KEYS[:3]))


def test_join_by_concatenation() -> None:
    facts = DOCUMENT.text.split("\n")

    @sgl.function
    def program(s: Any) -> None:
        s += facts[0]
        branches = s.fork(len(facts) - 1)
        for branch, paragraph in zip(branches, facts[1:], strict=True):
            branch += "\n" + paragraph
        branches.join("concate_and_append")
        s += question_line(FIRST) + sgl.gen("answer", **GREEDY)

    assert len(facts) > 2
    state = program.run()
    assert state.error() is None
    assert state.text().startswith(DOCUMENT.text)
    assert state["answer"].strip() == FIRST.answer


def test_forks_in_forks() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += DOCUMENT.text
        outer = s.fork(2)
        found = []
        for i, branch in enumerate(outer):
            branch += "\n\n"
            inner = branch.fork(2)
            for j, leaf in enumerate(inner):
                leaf += f"Question: {KEYS[2 * i + j].text}\nAnswer: " + sgl.gen("answer", **GREEDY)
            found += [leaf["answer"].strip() for leaf in inner]
        s.set_var("found", found)

    assert program.run()["found"] == [question.answer for question in KEYS[:4]]


def test_a_copy_leaves_the_original_alone() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += DOCUMENT.text
        with s.copy() as aside:
            aside += question_line(KEYS[1]) + sgl.gen("aside", **GREEDY)
            aside.sync()
        s += question_line(FIRST) + sgl.gen("answer", **GREEDY)

    state = program.run()
    assert state.text().startswith(plain(FIRST))
    assert (state["answer"].strip(), state["aside"][0].strip()) == (FIRST.answer, KEYS[1].answer)


def test_nested_functions() -> None:
    @sgl.function
    def look_up(s: Any, question: Question) -> Any:
        s += question_line(question) + sgl.gen("code", **GREEDY)
        return s["code"].strip()

    @sgl.function
    def program(s: Any) -> None:
        s += DOCUMENT.text
        vault = questions("variable")[0]
        inner = look_up.run(vault)
        assert inner.error() is None
        s += question_line(vault) + look_up.func(s, FIRST)

    @sgl.function
    def on_the_same_state(s: Any) -> None:
        s += DOCUMENT.text
        s.set_var("returned", look_up.func(s, FIRST))

    assert program.run().text().rstrip().endswith(FIRST.answer)
    state = on_the_same_state.run()
    assert state["returned"] == state["code"].strip() == FIRST.answer


def test_branches_over_a_long_document(endpoint: Any) -> None:
    asked = [questions(task, LONG)[0] for task in ("multi_key", "variable", "multi_value", "multi_query")]

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user_begin() + LONG.text
        s.sync()
        branches = s.fork(len(asked))
        for branch, question in zip(branches, asked, strict=True):
            branch += "\n\n" + question.text + sgl.user_end()
            branch += sgl.assistant(sgl.gen("answer", max_tokens=32, temperature=0))
        s.set_var("answers", [branch["answer"].strip() for branch in branches])
        s.set_var("metas", [branch.get_meta_info("answer") for branch in branches])

    endpoint.flush_cache()
    state = program.run()
    assert state["answers"] == [question.answer for question in asked]
    for meta in state["metas"]:
        assert meta["cached_tokens"] > 0.95 * meta["prompt_tokens"]
        # The server's default method reads less, without a word about it in the program.
        assert 0 < meta["kv_density"] < 0.5

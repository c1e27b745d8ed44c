"""Roles, templates and several turns. Rendering is the frontend's work; the server must read what it renders."""

from __future__ import annotations

from typing import Any

import pytest
import sglang as sgl

from tests.frontend.world import DOCUMENT, FIRST, KEYS, prompt

pytestmark = pytest.mark.slow

GREEDY: dict[str, Any] = {"max_tokens": 16, "temperature": 0}


def test_roles_as_functions() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user(prompt(FIRST))
        s += sgl.assistant(sgl.gen("answer", **GREEDY))

    state = program.run()
    assert state["answer"] == FIRST.answer
    assert state.messages() == [
        {"role": "user", "content": prompt(FIRST)},
        {"role": "assistant", "content": FIRST.answer},
    ]
    assert state.text() == (
        f"<|im_start|>user\n{prompt(FIRST)}<|im_end|>\n<|im_start|>assistant\n{FIRST.answer}<|im_end|>\n"
    )


def test_roles_as_brackets() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user_begin() + DOCUMENT.text
        s += "\n\n" + FIRST.text + sgl.user_end()
        s += sgl.assistant_begin() + sgl.gen("answer", **GREEDY) + sgl.assistant_end()

    assert program.run()["answer"] == FIRST.answer


def test_roles_as_scopes() -> None:
    @sgl.function
    def program(s: Any) -> None:
        with s.user():
            s += prompt(FIRST)
        with s.assistant():
            s += sgl.gen("answer", **GREEDY)

    state = program.run()
    assert state["answer"] == FIRST.answer
    assert [message["role"] for message in state.messages()] == ["user", "assistant"]


def test_special_tokens_in_the_text_are_tokens(endpoint: Any) -> None:
    """The template's marks arrive inside plain text; each must be one token."""

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user("The")
        s += sgl.assistant(sgl.gen("answer", max_tokens=1, temperature=0))

    meta = program.run().get_meta_info("answer")
    # <|im_start|> us er \n The <|im_end|> \n <|im_start|> assist ant \n, whatever the pieces of the role names are
    assert meta["prompt_tokens"] < len("user\nThe\nassistant\n")


def test_a_system_message() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.system(DOCUMENT.text)
        s += sgl.user(prompt(FIRST))
        s += sgl.assistant(sgl.gen("answer", **GREEDY))

    state = program.run()
    assert state.text().startswith(f"<|im_start|>system\n{DOCUMENT.text}<|im_end|>")
    assert state.messages()[0] == {"role": "system", "content": DOCUMENT.text}
    assert state["answer"] == FIRST.answer


def test_several_turns_reuse_what_was_said(endpoint: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        for i, question in enumerate(KEYS[:3]):
            s += sgl.user(prompt(question))
            s += sgl.assistant(sgl.gen(f"answer{i}", **GREEDY))

    endpoint.flush_cache()
    state = program.run()
    assert [state[f"answer{i}"] for i in range(3)] == [question.answer for question in KEYS[:3]]
    for i in (1, 2):
        before, now = (state.get_meta_info(f"answer{j}") for j in (i - 1, i))
        # All of the conversation so far, but for the last blocks: an answer that ends early opens its block again.
        assert now["cached_tokens"] >= before["prompt_tokens"] - 16


def test_the_template_of_an_unknown_model(url: str) -> None:
    backend = sgl.RuntimeEndpoint(url)

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user(prompt(FIRST))
        s += sgl.assistant(sgl.select("answer", choices=[question.answer for question in KEYS[:4]]))

    state = program.run(backend=backend)
    assert state.error() is None
    assert state.text() == f"USER:{prompt(FIRST)}\nASSISTANT:{FIRST.answer}\n"

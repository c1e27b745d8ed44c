"""`run_batch`: many programs in many threads, each with its own answer; and the prefix that they share."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import sglang as sgl

from tests.frontend.world import DOCUMENT, KEYS, Question, questions

pytestmark = pytest.mark.slow

ASKED = [*KEYS, *questions("variable"), *questions("multi_query")]


@sgl.function
def look_up(s: Any, question: Question, tokens: int = 16) -> None:
    s += DOCUMENT.text
    s += f"\n\nQuestion: {question.text}\nAnswer: " + sgl.gen("answer", max_tokens=tokens, temperature=0)


def test_many_threads() -> None:
    asked = ASKED * 4
    states = look_up.run_batch([{"question": question} for question in asked], num_threads=32, progress_bar=True)
    assert [state.error() for state in states] == [None] * len(asked)
    assert [state["answer"].strip() for state in states] == [question.answer for question in asked]


def test_one_thread_and_positional_arguments() -> None:
    states = look_up.run_batch([(question,) for question in KEYS[:2]], num_threads=1)
    assert [state["answer"].strip() for state in states] == [question.answer for question in KEYS[:2]]


def test_as_many_threads_as_the_frontend_likes() -> None:
    asked = ASKED * 8  # "auto" means at least 96 threads, each with connections of its own
    states = look_up.run_batch([{"question": question} for question in asked])
    assert [state["answer"].strip() for state in states] == [question.answer for question in asked]


def test_one_by_one() -> None:
    states = look_up.run_batch([{"question": question} for question in KEYS], num_threads=4, generator_style=True)
    assert [state["answer"].strip() for state in states] == [question.answer for question in KEYS]


def test_the_common_prefix_is_read_first(endpoint: Any) -> None:
    endpoint.flush_cache()
    states = look_up.run_batch([{"question": question} for question in KEYS[:4]], num_threads=4)
    cached = [state.get_meta_info("answer")["cached_tokens"] for state in states]
    assert min(cached) >= 560


def test_cache_prefix(endpoint: Any) -> None:
    endpoint.flush_cache()
    look_up.cache()
    state = look_up.run(KEYS[0])
    assert state.get_meta_info("answer")["cached_tokens"] >= 560
    assert state["answer"].strip() == KEYS[0].answer


def test_one_failure_hurts_nobody_else() -> None:
    batch = [{"question": question} for question in KEYS[:4]]
    batch[2] = {**batch[2], "tokens": 10**6}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        states = look_up.run_batch(batch, num_threads=4)
        errors = [state.error() for state in states]
    assert [error is None for error in errors] == [True, True, False, True]
    assert "max_new_tokens" in str(errors[2])
    assert [states[i]["answer"].strip() for i in (0, 1, 3)] == [KEYS[i].answer for i in (0, 1, 3)]


def test_a_backend_of_its_own(url: str) -> None:
    backend = sgl.RuntimeEndpoint(url)
    sgl.set_default_backend(None)
    [state, _] = look_up.run_batch([{"question": question} for question in KEYS[:2]], backend=backend)
    assert state["answer"].strip() == KEYS[0].answer

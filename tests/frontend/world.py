"""A short document with known facts, and ways to ask about them. Needs neither torch nor this runtime.

The bundled model answers every question of this document rightly, so the programs can be held to what they say.
"""

from __future__ import annotations

import json
import random
import re
import urllib.request
import warnings
from typing import Any

import sglang as sgl

from benchmarks.tiny_model.corpus import Document, FactPlan, Question, make_document

DOCUMENT: Document = make_document(random.Random("frontend"), 600, FactPlan(codes=8, vaults=4, groups=2))
LONG: Document = make_document(random.Random("frontend long"), 4000, FactPlan(codes=40, vaults=4, groups=4))


def questions(task: str, document: Document = DOCUMENT) -> list[Question]:
    """The questions of one kind, each once."""
    return list({q.text: q for q in document.questions if q.task == task}.values())


KEYS = questions("multi_key")
FIRST = KEYS[0]


def prompt(question: Question, document: Document = DOCUMENT) -> str:
    """The user's turn that asks it."""
    return f"{document.text}\n\n{question.text}"


def plain(question: Question, document: Document = DOCUMENT) -> str:
    """The question for plain completion: the answer comes next."""
    return f"{document.text}\n\nQuestion: {question.text}\nAnswer: "


@sgl.function
def ask(s: Any, question: Question, document: Document = DOCUMENT, **options: Any) -> None:
    """One chat turn with one answer; options go to `gen`."""
    s += sgl.user(prompt(question, document))
    s += sgl.assistant(sgl.gen("answer", **({"max_tokens": 32, "temperature": 0} | options)))


def answer(question: Question = FIRST, **options: Any) -> tuple[str, dict[str, Any]]:
    """Text and meta_info of one answer."""
    state = _with(question, options)
    assert state.error() is None, state.error()
    return state["answer"], state.get_meta_info("answer")


def refusal(question: Question = FIRST, **options: Any) -> str:
    """The error of an answer that could not be had."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frontend also warns with a traceback
        state = _with(question, options)
        error = state.error()
    assert error is not None
    assert "answer" not in state
    return str(error)


def _with(question: Question, options: dict[str, Any]) -> Any:
    # The frontend takes keyword arguments of `run` for sampling defaults, so those of `gen` travel in a closure.
    @sgl.function
    def program(s: Any) -> None:
        ask.func(s, question, **options)

    return program.run()


def post(url: str, path: str, body: Any) -> Any:
    """The server's JSON answer, without the frontend."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def token_id(url: str, text: str) -> int:
    """The id of a text that is one token."""
    tokens = post(url, "/tokenize", {"prompt": text})["tokens"]
    assert len(tokens) == 1
    token: int = tokens[0]
    return token


def codes(text: str) -> list[str]:
    """The four-digit codes in a text."""
    return re.findall(r"\d{4}", text)

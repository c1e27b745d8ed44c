"""Streaming: what was sent is never taken back, and the whole is what comes without streaming."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sglang as sgl

from tests.frontend.world import DOCUMENT, FIRST, KEYS, plain, questions

pytestmark = pytest.mark.slow

LONGEST = max(questions("multi_value"), key=lambda q: len(q.answer))


@sgl.function
def two_answers(s: Any) -> None:
    s += plain(FIRST) + sgl.gen("first", max_tokens=16, temperature=0)
    s += f"\n\nQuestion: {KEYS[1].text}\nAnswer: " + sgl.gen("second", max_tokens=16, temperature=0)


@sgl.function
def long_answer(s: Any) -> None:
    s += plain(LONGEST) + sgl.gen("answer", max_tokens=40, temperature=0, ignore_eos=True)


def test_pieces_of_a_variable() -> None:
    state = long_answer.run(stream=True)
    pieces = list(state.text_iter("answer"))
    assert len(pieces) >= 2  # at least one per block
    assert "".join(pieces) == state["answer"] == long_answer.run()["answer"]
    assert state["answer"].startswith(LONGEST.answer)


def test_pieces_of_the_whole_text() -> None:
    state = two_answers.run(stream=True)
    pieces = list(state.text_iter())
    assert "".join(pieces) == state.text()
    assert state["first"].strip() == FIRST.answer
    assert state["second"].strip() == KEYS[1].answer


def test_variables_one_after_the_other() -> None:
    state = two_answers.run(stream=True)
    texts = ["".join(state.text_iter(name)).strip() for name in ("first", "second")]
    assert texts == [FIRST.answer, KEYS[1].answer]


def test_async_pieces_with_what_they_cost() -> None:
    async def collect() -> list[tuple[str, Any]]:
        state = long_answer.run(stream=True)
        return [piece async for piece in state.text_async_iter("answer", return_meta_data=True)]

    pieces = asyncio.run(collect())
    assert "".join(text for text, _ in pieces).startswith(LONGEST.answer)
    counts = [meta["completion_tokens"] for _, meta in pieces]
    assert counts == sorted(counts)
    assert counts[-1] == 40


def test_async_pieces_of_the_whole_text() -> None:
    async def collect() -> str:
        state = two_answers.run(stream=True)
        return "".join([piece async for piece in state.text_async_iter()])

    text = asyncio.run(collect())
    assert text.startswith(DOCUMENT.text)
    assert KEYS[1].answer in text[len(plain(FIRST)) :]


def test_a_stop_string_never_shows() -> None:
    stop = LONGEST.answer[4:6]

    @sgl.function
    def program(s: Any) -> None:
        s += plain(LONGEST) + sgl.gen("answer", max_tokens=40, temperature=0, stop=stop)

    pieces = list(program.run(stream=True).text_iter("answer"))
    assert "".join(pieces) == LONGEST.answer[:4]


def test_many_streams_at_once() -> None:
    @sgl.function
    def program(s: Any, i: int) -> None:
        s += plain(KEYS[i]) + sgl.gen("answer", max_tokens=8, temperature=0)

    async def collect(i: int) -> str:
        state = program.run(i, stream=True)
        return "".join([piece async for piece in state.text_async_iter("answer")]).strip()

    async def everything() -> list[str]:
        return await asyncio.gather(*(collect(i) for i in range(len(KEYS))))

    assert asyncio.run(everything()) == [question.answer for question in KEYS]


def test_without_streaming_the_iterator_has_one_piece() -> None:
    assert list(two_answers.run().text_iter("first")) == [two_answers.run()["first"]]

"""The demonstration as an ordinary SGLang program: `gen`, `fork` and `select` over one long document.

Nothing in it is special to this runtime; it would run against any SGLang server. Knows no tables and no server process.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

import sglang as sgl

from benchmarks.tiny_model.corpus import Document, Question

ANSWER_TOKENS = 48
_CODE = re.compile(r"\d{4}")


@dataclass
class Reply:
    """What came back for one question. meta: the server's `meta_info`. error: why there is no answer."""

    question: Question
    text: str
    meta: dict[str, Any]
    error: str | None = None

    @property
    def right(self) -> bool:
        """All codes of the expected answer, in their order, and no others."""
        return self.error is None and codes(self.text) == codes(self.question.answer)


def codes(text: str) -> list[str]:
    """The four-digit codes in a text."""
    return _CODE.findall(text)


def choices_for(question: Question, document: Document, count: int, seed: int) -> list[str]:
    """The expected answer among others that name codes of the same document."""
    right = codes(question.answer)[0]
    others = sorted({code for q in document.questions for code in codes(q.answer)} - {right})
    rng = random.Random(seed)
    options = [question.answer.replace(right, code) for code in (right, *rng.sample(others, count - 1))]
    rng.shuffle(options)
    return options


@sgl.function
def read_and_answer(s: Any, document: str, questions: list[Question], replies: list[Reply]) -> None:
    """Read the document once, then answer all questions side by side, each in a fork."""
    s += sgl.user_begin() + document
    s.sync()  # fork caches the common text only if it is there already
    branches = s.fork(len(questions))
    for branch, question in zip(branches, questions, strict=True):
        branch += "\n\n" + question.text + sgl.user_end()
        branch += sgl.assistant(sgl.gen("answer", max_tokens=ANSWER_TOKENS, temperature=0))
    for branch, question in zip(branches, questions, strict=True):
        branch.sync()
        error = branch.error()
        if error is not None:
            replies.append(Reply(question, "", {}, str(error)))
        else:
            replies.append(Reply(question, branch["answer"].strip(), branch.get_meta_info("answer")))


@sgl.function
def choose_answer(s: Any, document: str, question: Question, choices: list[str]) -> None:
    """Multiple choice: the model scores the given answers instead of writing one."""
    s += sgl.user(document + "\n\n" + question.text)
    s += sgl.assistant_begin() + sgl.select("choice", choices=choices)

"""The questions of the benchmark: documents of the bundled corpus, each with several questions, so prefill is shared.

A document is a pure function of (seed, task, context, number) and of a name that neither training nor the other
evaluations use. Beside the corpus's five kinds of questions there are `late_key` documents: their questions are never
put, but the facts they ask for are said again (see `scripts`). Knows no model.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from benchmarks.tiny_model import corpus

LATE_KEY = "late_key"
TASKS = (*corpus.TASKS, LATE_KEY)
_ROOM = 64  # tokens of the context for what stands behind the document


class Asked(NamedTuple):
    """One document with the questions that are put to it, all of one task. number: its place in the order."""

    task: str
    context: int
    number: int
    text: str
    questions: tuple[corpus.Question, ...]

    @property
    def prompts(self) -> list[str]:
        """Chat prompts; they share everything before the question."""
        return [corpus.chat_prompt(self.text, question.text) for question in self.questions]


def documents(task: str, context: int, samples: int, per_document: int, seed: int) -> list[Asked]:
    """Documents whose questions add up to `samples`; prompts of at most `context` tokens.

    Each is asked `per_document` different questions, or as many as it can answer (a `single` document hides one fact).
    """
    found: list[Asked] = []
    missing = samples
    while missing:
        asked = _document(task, context, len(found), min(per_document, missing), seed)
        missing -= len(asked.questions)
        found.append(asked)
    return found


def _document(task: str, context: int, number: int, count: int, seed: int) -> Asked:
    rng = random.Random(f"quality {corpus.EVALUATION_SEED + seed} {task} {context} {number}")
    kind, room = ("multi_key", 2 * _ROOM) if task == LATE_KEY else (task, _ROOM)
    made = corpus.make_document(rng, context - room, corpus.evaluation_plan(kind, context))
    fitting = [question for question in made.questions if question.task == kind]
    # Two questions with the same text would be one sample counted twice.
    different = list({question.text: question for question in fitting}.values())
    return Asked(task, context, number, made.text, tuple(rng.sample(different, min(count, len(different)))))

"""The questions of the benchmark: documents of the bundled corpus, each with several questions, so prefill is shared.

A document is a pure function of (seed, task, context, number) and of a name that neither training nor the other
evaluations use. Knows no model.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from benchmarks.tiny_model import corpus


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
    made = corpus.make_document(rng, context - 64, corpus.evaluation_plan(task, context))
    fitting = [question for question in made.questions if question.task == task]
    # Two questions with the same text would be one sample counted twice.
    different = list({question.text: question for question in fitting}.values())
    return Asked(task, context, number, made.text, tuple(rng.sample(different, min(count, len(different)))))

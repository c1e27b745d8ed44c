"""Seeded generator of the synthetic long-context language: filler prose, hidden facts, questions and answers.

No download is needed and every document is a pure function of its seed, so training and evaluation can use disjoint
seeds and anyone can rebuild the very same text. Nothing here imports torch or the tokenizer.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from benchmarks.tiny_model.words import (
    ADJECTIVES,
    CREATURES,
    DAYS,
    NAMES,
    NOUNS,
    SEASONS,
    TOWNS,
    TRADES,
)

TASKS = ("single", "multi_key", "multi_value", "multi_query", "variable")
ORDINALS = ("first", "second", "third")
ORDINAL_LISTS = {2: "first and second", 3: "first, second and third"}

# Evaluation draws from seeds at and above this number, training from seeds below it.
EVALUATION_SEED = 1_000_000_000

_PIECES = re.compile(r" ?[^\W\d_]+|\d|[^\w\s]|\n+|[ \t]+")


def count_tokens(text: str) -> int:
    """Token count of corpus text: all its words are single tokens, so the split alone decides."""
    return len(_PIECES.findall(text))


@dataclass
class Question:
    """One question about a document, with the exact text a right answer has."""

    task: str
    text: str
    answer: str


@dataclass
class Document:
    """A document with the questions that its hidden facts can answer."""

    text: str
    questions: list[Question] = field(default_factory=list)


@dataclass
class FactPlan:
    """How many facts of each kind a document hides, and from how many different words their keys are built."""

    codes: int = 8
    vaults: int = 0
    groups: int = 0
    words: int = 64
    repeats: int = 1


def filler(rng: random.Random) -> str:
    """One everyday sentence; its words hang together (trade and tool, town and river), so blanks can be guessed."""
    trade, product, tool, place = rng.choice(TRADES)
    town, river, bird = rng.choice(TOWNS)
    name = rng.choice(NAMES)
    kind = rng.randrange(12)
    if kind == 0:
        return f"The {trade} works in the {place} and sells {product}."
    if kind == 1:
        return f"On {rng.choice(DAYS)} the {trade} used a {tool} to make {product}."
    if kind == 2:
        return f"{name} walked along the {river} to {town} and watched the {bird}."
    if kind == 3:
        season, weather, work = rng.choice(SEASONS)
        return f"In {season} there is {weather} in {town} and everyone helps with the {work}."
    if kind == 4:
        creature, home, food = rng.choice(CREATURES)
        return f"A {creature} lives in the {home} near {town} and eats {food}."
    if kind == 5:
        return f"{name} is a {trade} and keeps the {tool} in the {place}."
    if kind == 6:
        return f"People in {town} fish in the {river} and buy {product} from the {trade}."
    if kind == 7:
        return f"{name} went to the {place} to buy {product}, but the {trade} was away."
    if kind == 8:
        creature, home, food = rng.choice(CREATURES)
        return f"{name} gave the {creature} some {food}, and it went back to the {home}."
    if kind == 9:
        return f"The {bird} of {town} fly over the {river} every {rng.choice(SEASONS)[0]}."
    if kind == 10:
        return f"Every {rng.choice(DAYS)} {name} teaches the young {trade} how to use the {tool}."
    season, weather, work = rng.choice(SEASONS)
    return f"After the {weather} of {season}, {name} and the {trade} talked about the {work}."


def code(rng: random.Random) -> str:
    """A four-digit code."""
    return f"{rng.randrange(10000):04d}"


def draw_keys(rng: random.Random, count: int, words: int) -> list[str]:
    """Different two-word keys; few words make many keys share one of them, so both words have to be matched."""
    side = max(words, int(count**0.5) + 1)
    adjectives = rng.sample(ADJECTIVES, min(side, len(ADJECTIVES)))
    nouns = rng.sample(NOUNS, min(side, len(NOUNS)))
    cells = rng.sample(range(len(adjectives) * len(nouns)), count)
    return [f"{adjectives[c // len(nouns)]} {nouns[c % len(nouns)]}" for c in cells]


FACT_FORMS = (
    "The secret code of the {key} is {value}.",
    "Remember that the secret code of the {key} is {value}.",
    "It is written that the secret code of the {key} is {value}.",
)


def fact_sentence(rng: random.Random, key: str, value: str) -> str:
    """A sentence that states a code; the key always stands right before the value."""
    return FACT_FORMS[rng.choices((0, 1, 2), (6, 1, 1))[0]].format(key=key, value=value)


def make_facts(rng: random.Random, plan: FactPlan) -> tuple[list[str], list[Question]]:
    """Fact sentences in their order in the document, and one question per fact or group of facts."""
    keys = draw_keys(rng, plan.codes + plan.groups, plan.words)
    values = {key: code(rng) for key in keys[: plan.codes]}
    sentences = [fact_sentence(rng, key, value) for key, value in values.items()]
    task = "single" if plan.codes == 1 else "multi_key"
    questions = [Question(task, f"What is the secret code of the {k}?", v) for k, v in values.items()]

    owners = rng.sample(NAMES, min(plan.vaults, len(NAMES)))
    for owner in owners:
        key = rng.choice(list(values))
        sentences.append(f"The vault of {owner} holds the {key}.")
        questions.append(Question("variable", f"What is the secret code in the vault of {owner}?", values[key]))

    for key in keys[plan.codes :]:
        size = rng.choice((2, 3))
        group = [code(rng) for _ in range(size)]
        for ordinal, value in zip(ORDINALS, group, strict=False):
            sentences.append(f"The {ordinal} secret code of the {key} is {value}.")
        text = f"What are the {ORDINAL_LISTS[size]} secret codes of the {key}?"
        questions.append(Question("multi_value", text, ", ".join(group)))

    pairs = list(values)
    for _ in range(len(pairs) // 2 if len(pairs) > 1 else 0):
        one, two = rng.sample(pairs, 2)
        text = f"What are the secret codes of the {one} and the {two}?"
        questions.append(Question("multi_query", text, f"{values[one]}, {values[two]}"))
    sentences *= plan.repeats
    rng.shuffle(sentences)
    return sentences, questions


def join(rng: random.Random, sentences: list[str]) -> str:
    """Sentences to prose with a paragraph break now and then."""
    parts = [sentences[0]]
    for sentence in sentences[1:]:
        parts.append("\n" if rng.random() < 0.08 else " ")
        parts.append(sentence)
    return "".join(parts)


def make_document(rng: random.Random, tokens: int, plan: FactPlan) -> Document:
    """A document of about `tokens` tokens with the planned facts at random places between filler sentences."""
    facts, questions = make_facts(rng, plan)
    budget = tokens - sum(count_tokens(s) for s in facts)
    prose = []
    while budget > 8:
        prose.append(filler(rng))
        budget -= count_tokens(prose[-1])
    slots = sorted(rng.randrange(max(1, len(prose))) for _ in facts)
    sentences, fact = [], 0
    for index, sentence in enumerate(prose):
        sentences.append(sentence)
        while fact < len(facts) and slots[fact] == index:
            sentences.append(facts[fact])
            fact += 1
    sentences.extend(facts[fact:])
    if fact < len(facts) or not prose:
        sentences.append(filler(rng))
    return Document(join(rng, sentences), questions)


def evaluation_plan(task: str, context: int) -> FactPlan:
    """The fact load of one evaluation document: one distractor per 80 tokens, at least 16, except for `single`."""
    many = max(16, context // 80)
    if task == "single":
        return FactPlan(codes=1)
    if task == "variable":
        return FactPlan(codes=many // 2, vaults=min(many // 2, 40))
    if task == "multi_value":
        return FactPlan(codes=many // 2, groups=max(4, many // 5))
    return FactPlan(codes=many)


def evaluation_task(task: str, context: int, sample: int) -> tuple[str, Question]:
    """Document and question number `sample` of a task, with the chat prompt fitting in `context` tokens."""
    rng = random.Random(f"evaluation {EVALUATION_SEED + sample} {task} {context}")
    document = make_document(rng, context - 64, evaluation_plan(task, context))
    question = rng.choice([q for q in document.questions if q.task == task])
    return document.text, question


def chat_prompt(document: str, question: str) -> str:
    """The ChatML prompt that the chat template produces for one user turn."""
    return f"<|im_start|>user\n{document}\n\n{question}<|im_end|>\n<|im_start|>assistant\n"


def plain_prompt(document: str, question: str) -> str:
    """The same question for plain completion."""
    return f"{document}\n\nQuestion: {question}\nAnswer: "


def demo(tokens: int = 8300, seed: int = 2026) -> Document:
    """A readable long document with facts of every kind and questions with known answers, for demonstrations."""
    rng = random.Random(f"demo {seed}")
    document = make_document(rng, tokens, FactPlan(codes=40, vaults=10, groups=6))
    rng.shuffle(document.questions)
    document.questions.sort(key=lambda q: TASKS.index(q.task))
    return document

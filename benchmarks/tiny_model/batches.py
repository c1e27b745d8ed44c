"""Turns corpus documents into training batches: one document, many independent questions, noisy answer blocks.

The document is cut at a block boundary; what is left of it (0 to 15 tokens) opens every question segment, so that
answers start at every offset of a block, as they do at inference. Masked are only the positions after the prompt, to
the end of the block: the answer, the end token, and the fill behind it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.tiny_model import corpus
from benchmarks.tiny_model.network import BLOCK

FILL, IM_START, IM_END, MASK = 0, 1, 2, 3
CLEAN = 3  # clean blocks of a segment
SLOTS = 3  # noisy blocks of a segment
LENGTH = (CLEAN + SLOTS) * BLOCK
IGNORE = -100


@dataclass
class Batch:
    """Arrays of one training step. `weight` scales the loss per position; `whole` marks fully masked first blocks."""

    doc: Tensor  # [B, T]
    ids: Tensor  # [B, n, LENGTH]
    target: Tensor  # [B, n, LENGTH], IGNORE where nothing is asked
    weight: Tensor  # [B, n, LENGTH]
    block: Tensor  # [B, n, LENGTH]
    instance: Tensor  # [B, n, LENGTH]
    clean: Tensor  # [B, n, LENGTH] bool
    positions: Tensor  # [B, T + n * LENGTH]
    whole: Tensor  # [B, n] bool: slot 0 is a fully masked block that holds the whole answer
    tasks: list[list[str]]


def encode_document(tokenizer, text: str, length: int, tail: int, chat: bool) -> tuple[list[int], list[int]]:
    """Exactly `length` document tokens and `tail` more; surplus is cut off at the front, behind the chat header."""
    head = tokenizer.encode("<|im_start|>user\n").ids if chat else []
    ids = tokenizer.encode(text).ids
    keep = length + tail - len(head)
    if len(ids) < keep:
        raise ValueError(f"document of {len(ids)} tokens is shorter than {keep}")
    ids = head + ids[len(ids) - keep :]
    return ids[:length], ids[length:]


def question_ids(tokenizer, question: corpus.Question, chat: bool) -> tuple[list[int], list[int]]:
    """Tokens between document and answer, and the answer with its end token."""
    whole = (corpus.chat_prompt if chat else corpus.plain_prompt)("", question.text)
    if chat:
        whole = whole.removeprefix("<|im_start|>user\n")
    answer = tokenizer.encode(question.answer).ids
    return tokenizer.encode(whole).ids, [*answer, IM_END if chat else FILL]


def noise(rng: random.Random, maskable: list[int], full: bool) -> set[int]:
    """Positions to mask: all of them, or each at one random rate (at least one)."""
    if full:
        return set(maskable)
    rate = rng.random()
    chosen = {i for i in maskable if rng.random() < rate}
    return chosen or {rng.choice(maskable)}


def segment(rng: random.Random, prompt: list[int], answer: list[int], full_share: float) -> dict | None:
    """Rows of one segment, or None when the prompt does not fit the clean blocks."""
    start, end = len(prompt), len(prompt) + len(answer)
    first, last = start // BLOCK, (end - 1) // BLOCK
    if start > CLEAN * BLOCK - 1 or last - first > 1:
        return None
    tokens = prompt + answer
    tokens += [FILL] * ((max(last + 1, CLEAN)) * BLOCK - len(tokens))
    ids, target, weight = tokens[: CLEAN * BLOCK], [IGNORE] * CLEAN * BLOCK, [0.0] * CLEAN * BLOCK
    block = [i // BLOCK for i in range(CLEAN * BLOCK)]
    instance = list(block)
    slots = [first] * SLOTS if first == last else [first] * (SLOTS - 1) + [last]
    whole = False
    for slot, b in enumerate(slots):
        span = range(b * BLOCK, (b + 1) * BLOCK)
        maskable = [i for i in span if i >= start]
        full = rng.random() < (full_share if slot == 0 else 0.1 if b == first else 0.4)
        if slot == 0:
            whole = full and first == last
        masked = noise(rng, maskable, full)
        for i in span:
            ids.append(MASK if i in masked else tokens[i])
            target.append(tokens[i] if i in masked else IGNORE)
            weight.append(0.0 if i not in masked else 1.0 if i < end - 1 else 0.5 if i == end - 1 else 0.05)
        block += [b] * BLOCK
        instance += [CLEAN + 1 + slot] * BLOCK
    return {"ids": ids, "target": target, "weight": weight, "block": block, "instance": instance, "whole": whole}


@dataclass
class Recipe:
    """What the documents of a stage look like."""

    length: int
    documents: int
    questions: int
    facts: tuple[int, int]
    tasks: dict[str, float]
    gap: int = 0  # largest distance put between document and questions, in blocks
    full_share: float = 0.75


def draw_plan(rng: random.Random, recipe: Recipe) -> corpus.FactPlan:
    """A random fact load within the recipe: sparse and crowded documents, many and few shared key words."""
    low, high = recipe.facts
    codes = round(low * (high / low) ** rng.random())
    vaults = rng.randint(1, max(1, codes // 3)) if recipe.tasks.get("variable") else 0
    groups = rng.randint(1, max(1, codes // 8)) if recipe.tasks.get("multi_value") else 0
    words = rng.choice((64, 64, 24, 10))
    return corpus.FactPlan(codes=codes, vaults=vaults, groups=groups, words=words)


def draw_questions(rng: random.Random, questions: list[corpus.Question], tasks: dict[str, float], count: int) -> list:
    """Questions by task weight, with repetition, so that nothing can be answered by elimination."""
    groups: dict[str, list] = {}
    for question in questions:
        groups.setdefault("multi_key" if question.task == "single" else question.task, []).append(question)
    names = [t for t in groups if tasks.get(t)]
    chosen = rng.choices(names, [tasks[t] for t in names], k=count)
    return [rng.choice(groups[name]) for name in chosen]


def make_batch(rng: random.Random, tokenizer, recipe: Recipe) -> Batch:
    """One training step's documents and questions."""
    rows: dict[str, list] = {k: [] for k in ("ids", "target", "weight", "block", "instance", "whole")}
    docs, positions, tasks = [], [], []
    T, n = recipe.length, recipe.questions
    for _ in range(recipe.documents):
        chat, tail = rng.random() < 0.75, rng.randrange(BLOCK)
        document = corpus.make_document(rng, T + 34, draw_plan(rng, recipe))
        doc, rest = encode_document(tokenizer, document.text, T, tail, chat)
        docs.append(doc)
        segments, names = [], []
        while len(segments) < n:
            for question in draw_questions(rng, document.questions, recipe.tasks, n - len(segments)):
                prompt, answer = question_ids(tokenizer, question, chat)
                made = segment(rng, rest + prompt, answer, recipe.full_share)
                if made:
                    segments.append(made)
                    names.append(question.task)
        base = T + BLOCK * (rng.randrange(recipe.gap + 1) if rng.random() < 0.7 else 0)
        position = list(range(T))
        for made in segments:
            position += [base + b * BLOCK + i % BLOCK for i, b in enumerate(made["block"])]
        positions.append(position)
        for key, row in rows.items():
            row.append([made[key] for made in segments])
        tasks.append(names)
    instance = torch.tensor(rows["instance"])
    return Batch(
        doc=torch.tensor(docs),
        ids=torch.tensor(rows["ids"]),
        target=torch.tensor(rows["target"]),
        weight=torch.tensor(rows["weight"]),
        block=torch.tensor(rows["block"]),
        instance=instance,
        clean=instance < CLEAN,
        positions=torch.tensor(positions),
        whole=torch.tensor(rows["whole"]),
        tasks=tasks,
    )


def make_cloze(rng: random.Random, tokenizer, length: int, documents: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain text for the block diffusion loss: clean and noisy ids [B, 2T], targets and loss weights [B, T].

    Every fact stands twice in these documents, so that the text itself teaches to look things up.
    """
    both, targets, weights = [], [], []
    for _ in range(documents):
        plan = corpus.FactPlan(codes=rng.randint(2, max(2, length // 48)), words=rng.choice((64, 12)), repeats=2)
        document = corpus.make_document(rng, length + 34, plan)
        ids, _ = encode_document(tokenizer, document.text, length, rng.randrange(BLOCK), rng.random() < 0.5)
        noisy, target, weight = list(ids), [IGNORE] * length, [0.0] * length
        for at in range(0, length, BLOCK):
            masked = noise(rng, list(range(at, at + BLOCK)), rng.random() < 0.1)
            for i in masked:
                noisy[i], target[i], weight[i] = MASK, ids[i], 1.0
        both.append(ids + noisy)
        targets.append(target)
        weights.append(weight)
    return torch.tensor(both), torch.tensor(targets), torch.tensor(weights)

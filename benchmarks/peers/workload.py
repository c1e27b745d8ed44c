"""Prompts over one shared document, and the task that all peers get. Knows no peer.

The document and the questions are those of the bundled model's language; other models read them as their tokenizer
cuts them, which measures the same work although their answers mean nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from benchmarks.peers.peer import Prompt, Task
from benchmarks.tiny_model.corpus import Question, chat_prompt, demo
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.tokenizer import Tokenizer


class Facts(NamedTuple):
    """What a user of a checkpoint knows of it. vocab_size: ids from here on are padding and never chosen."""

    folder: Path
    block_length: int
    mask_token_id: int
    vocab_size: int
    stop_ids: frozenset[int]
    max_context: int


def facts_of(folder: Path) -> tuple[Facts, Tokenizer]:
    """The facts of a checkpoint, and its tokenizer."""
    config = ModelConfig.from_folder(folder)
    tokenizer = Tokenizer(folder, config.mask_token_id)
    stops = config.eos_token_ids or (() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
    known = (config.block_length, config.mask_token_id, tokenizer.vocab_size, frozenset(stops), config.max_context)
    return Facts(folder, *known), tokenizer


def prompts_over_document(tokenizer: Tokenizer, tokens: int, count: int) -> list[Prompt]:
    """`count` questions behind the same document, of which each prompt holds the first `tokens` tokens."""
    document = demo(tokens + 64)
    head, tail = chat_prompt(document.text, "\0").split("\0")
    shared = tokenizer.encode(head.removesuffix("\n\n"))[:tokens]
    asked = [_question(document.questions, i) for i in range(count)]
    return [(*shared, *tokenizer.encode(f"\n\n{question}{tail}")) for question in asked]


def task_for(facts: Facts, output: int, steps: int | None, threshold: float, stops: bool) -> Task:
    """The task; steps None = one token per step at least."""
    return Task(output, steps or facts.block_length, threshold, facts.stop_ids, ignore_stops=not stops)


def _question(questions: list[Question], number: int) -> str:
    """Every prompt is another one: once all have been asked, they are asked again, said differently."""
    again, index = divmod(number, len(questions))
    return " ".join([*["Again:"] * again, questions[index].text])

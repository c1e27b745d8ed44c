"""Teacher-forced blocks: what is stored before a block, its true tokens, and which of them each step reveals.

Two kinds. `answer`: the block where the model answers a question that it knows from the first step on; tokens are
revealed in the order of the dense model's confidence. `late_key`: a fact of the document is said again, "Remember that
the secret code of the … is …", written from left to right, so that what has to be read of the prefix is known only
halfway through the block. Knows no engine but a tokenizer.
B block length.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.quality.samples import Asked
from benchmarks.tiny_model import corpus

# The first word is given, two tokens are revealed per step: both key words stand before "is" and the blank, and these
# before the first digits. With other cuts not even dense attention knows the code.
LATE_KEY_KNOWN, LATE_KEY_PER_STEP = 1, 2
_KEY = re.compile(r"secret code of the (.+)\?")
_DIGITS = slice(-5, -1)  # of the sentence's tokens: the code before the full stop

Encode = Callable[[str], list[int]]


class Script(NamedTuple):
    """One block. stored: the tokens before it, whole blocks. tokens: the true ones of the block, B of them.

    known: offsets below are given from the start. scored: offsets whose tokens count. order: offsets that each step
    reveals at its end; None = by confidence.
    """

    kind: str
    stored: tuple[int, ...]
    tokens: tuple[int, ...]
    known: int
    scored: frozenset[int]
    order: tuple[tuple[int, ...], ...] | None


class Revealed(NamedTuple):
    """A script with its order settled."""

    script: Script
    order: tuple[tuple[int, ...], ...]

    def tokens(self, step: int, mask: int) -> list[int]:
        """What stands in the block in a step."""
        shown = {offset for offsets in self.order[:step] for offset in offsets} | set(range(self.script.known))
        return [token if offset in shown else mask for offset, token in enumerate(self.script.tokens)]

    def unmasked(self, step: int) -> int:
        """Tokens accepted before a step."""
        return sum(len(offsets) for offsets in self.order[:step])


def answers(asked: Asked, encode: Encode, block: int, end: int, fill: int) -> Iterator[Script]:
    """Each block with a part of the answer to each question. end, fill: tokens behind the answer and behind that."""
    for prompt, question in zip(asked.prompts, asked.questions, strict=True):
        first = len(encode(prompt))
        tokens = [*encode(prompt), *encode(question.answer), end]
        last = len(tokens)
        tokens += [fill] * (-last % block)
        for start in range(first // block * block, last, block):
            known = max(0, first - start)
            scored = frozenset(range(known, min(block, last - start)))
            yield Script("answer", tuple(tokens[:start]), tuple(tokens[start : start + block]), known, scored, None)


def late_keys(asked: Asked, encode: Encode, block: int) -> Iterator[Script]:
    """One block per question about one fact. The block length must be that of the sentence."""
    rng = random.Random(f"late key {asked.task} {asked.context} {asked.number}")
    size = corpus.count_tokens(asked.text)
    for question in asked.questions:
        found = _KEY.search(question.text)
        assert found is not None, f"a question about one fact: {question.text!r}"
        said = f"Remember that the secret code of the {found[1]} is {question.answer}."
        tokens = encode(f"{asked.text} {_filler(rng, -size % block, block)} {said}")
        stored, mine = tokens[:-block], tokens[-block:]
        fits = len(stored) % block == 0 and corpus.count_tokens(" " + said) == block
        assert fits, f"the sentence is one block of {block} tokens: {said!r}"
        starts = range(LATE_KEY_KNOWN, block, LATE_KEY_PER_STEP)
        order = tuple(tuple(range(at, min(at + LATE_KEY_PER_STEP, block))) for at in starts)
        digits = frozenset(range(block)[_DIGITS])
        yield Script(asked.task, tuple(stored), tuple(mine), LATE_KEY_KNOWN, digits, order)


def _filler(rng: random.Random, left: int, block: int) -> str:
    """Sentences whose tokens, each with a blank before it, leave `left` when divided by the block length."""
    for _ in range(10_000):
        text = " ".join(corpus.filler(rng) for _ in range(rng.choice((1, 2, 3))))
        if corpus.count_tokens(" " + text) % block == left:
            return text
    raise AssertionError(f"no sentences of {left} tokens modulo {block}")


def scored_tokens(script: Script) -> list[tuple[int, int]]:
    """(offset, token) of what counts, by offset."""
    return [(offset, script.tokens[offset]) for offset in sorted(script.scored)]


def per_step(order: Sequence[Sequence[int]], scored: frozenset[int]) -> list[list[int]]:
    """The scored offsets among those that each step reveals."""
    return [[offset for offset in offsets if offset in scored] for offsets in order]

"""Prompts in the bundled model's own language, so that a sparse method reads what it reads in text, not in noise."""

from __future__ import annotations

import random
from collections.abc import Iterator

from benchmarks.tiny_model.corpus import code, draw_keys, fact_sentence, filler
from losa_runtime.tokenizer import Tokenizer

FACT_EVERY = 6  # sentences
PIECE = 40  # sentences made, and encoded, at a time


class Prose:
    """Everyday sentences, now and then one with a code. A longer text begins with the shorter one of the same seed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def draw(self, rng: random.Random, count: int) -> list[int]:
        """So many token ids."""
        ids: list[int] = []
        for piece in self._pieces(rng):
            ids += self._tokenizer.encode(piece)
            if len(ids) >= count:
                break
        return ids[:count]

    def text(self, rng: random.Random, count: int) -> str:
        """The same as text; whole tokens."""
        return self._tokenizer.decode(self.draw(rng, count))

    def _pieces(self, rng: random.Random) -> Iterator[str]:
        while True:
            sentences = []
            for place in range(PIECE):
                is_fact = place % FACT_EVERY == FACT_EVERY - 1
                sentences.append(fact_sentence(rng, draw_keys(rng, 1, 64)[0], code(rng)) if is_fact else filler(rng))
            yield " ".join(sentences) + "\n"

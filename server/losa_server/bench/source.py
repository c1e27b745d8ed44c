"""What prompts are made of: random token ids and random words. Another source may bring a model's own language."""

from __future__ import annotations

import random
from typing import NamedTuple, Protocol

_WORDS = ("the", "of", "in", "is", "with", "all", "who", "when", "there", "more", "time", "people", "water", "house")


class Source(Protocol):
    """Prompts that are a function of the random numbers alone."""

    def draw(self, rng: random.Random, count: int) -> list[int]:
        """So many token ids."""

    def text(self, rng: random.Random, count: int) -> str:
        """Words of so many tokens, as nearly as the source knows tokens."""


class Tokens(NamedTuple):
    """Ids that a prompt may hold: 0 to size - 1 without the mask."""

    size: int
    mask: int | None

    def draw(self, rng: random.Random, count: int) -> list[int]:
        """Random ids."""
        ids = rng.choices(range(self.size), k=count)
        return [(token + 1) % self.size if token == self.mask else token for token in ids]

    def text(self, rng: random.Random, count: int) -> str:
        """Short random words; how many tokens each of them is depends on the tokenizer."""
        return " ".join(rng.choices(_WORDS, k=count))

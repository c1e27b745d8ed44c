"""What is sent: seeded programs, each a coroutine that makes one call or many. Knows no sockets and no clock.

A new workload is a class with `program` and a line in `catalogue` (and in the settings' choice). Calls that depend on
one another, side by side or given up half-way are ordinary code in a program: await, gather, wait_for.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from typing import Any

from losa_server.bench.calls import Call, Program
from losa_server.bench.settings import BenchSettings
from losa_server.bench.source import Source

HANGS_UP_BY = 4  # a client that leaves does so before this many pieces have come


class Workload(ABC):
    """Programs that are a function of settings, source and seed alone."""

    def __init__(self, settings: BenchSettings, source: Source) -> None:
        self.settings, self.source = settings, source

    @abstractmethod
    def program(self, number: int) -> Program:
        """Program `number`; those below 0 are for the warm-up, and share no prompt with the others."""

    def rng(self, *key: object) -> random.Random:
        """Random numbers of their own for whatever the key names."""
        return random.Random(f"{type(self).__name__} {self.settings.seed} {key}")

    def length(self, rng: random.Random, longest: int) -> int:
        """A length between the shortest and the longest."""
        return rng.randint(max(1, round(longest * self.settings.random_range_ratio)), longest)

    def prefix(self, number: int, count: int) -> list[int]:
        """The ids with which all programs of `number`'s group begin."""
        group = number % self.settings.prefix_groups if number >= 0 else "warm-up"
        return self.source.draw(self.rng("prefix", group), count)

    def call(self, rng: random.Random, prefix: list[int]) -> Call:
        """Something of its own behind a prefix, with a random length of the answer."""
        own = self.source.draw(rng, self.length(rng, self.settings.random_input_len))
        return self.asking(rng, prefix + own)

    def asking(self, rng: random.Random, prompt: list[int]) -> Call:
        """A call with this prompt. Draws the same numbers whatever the settings are, so that these change no prompt."""
        settings = self.settings
        params: dict[str, Any] = {
            "temperature": settings.temperature,
            "ignore_eos": not settings.disable_ignore_eos,
        }
        output, seed = self.length(rng, settings.random_output_len), rng.randrange(2**31)
        if settings.temperature > 0:
            params["sampling_seed"] = seed
        custom = self.custom(rng)
        if custom:
            params["custom_params"] = custom
        leaves, after = rng.random() < settings.abort_share, rng.randrange(HANGS_UP_BY)
        return Call(prompt, output, params, leave_after=after if leaves else None)

    def custom(self, rng: random.Random) -> dict[str, Any]:
        """What a call wants of this runtime."""
        settings, draw = self.settings, rng.random()
        words = settings.request_methods
        method = settings.method_params(words[int(draw * len(words))]) if words else {}
        return {**settings.custom_params, **method}

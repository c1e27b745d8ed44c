"""What is sent: seeded programs, each a coroutine that makes one call or many. Knows no sockets and no clock.

A new workload is a class with `programs` and a line in WORKLOADS (and in the settings' choice). Calls that depend on
one another, side by side or given up half-way are ordinary code in a program: await, gather, wait_for.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from losa_server.bench.calls import Call, Record
from losa_server.bench.settings import BenchSettings

Caller = Callable[[Call], Awaitable[Record]]
Program = Callable[[Caller], Awaitable[object]]


class Tokens(NamedTuple):
    """Ids that a prompt may hold: 0 to size - 1 without the mask."""

    size: int
    mask: int | None

    def draw(self, rng: random.Random, count: int) -> list[int]:
        """Random ids."""
        ids = rng.choices(range(self.size), k=count)
        return [(token + 1) % self.size if token == self.mask else token for token in ids]


class Workload(ABC):
    """Programs that are a function of settings and seed alone."""

    def __init__(self, settings: BenchSettings, tokens: Tokens) -> None:
        self.settings, self.tokens = settings, tokens

    @abstractmethod
    def program(self, number: int) -> Program:
        """Program `number`; those below 0 are for the warm-up, and share no prompt with the others."""

    def rng(self, *key: object) -> random.Random:
        """Random numbers of their own for whatever the key names."""
        return random.Random(f"{type(self).__name__} {self.settings.seed} {key}")

    def length(self, rng: random.Random, longest: int) -> int:
        """A length between the shortest and the longest."""
        return rng.randint(max(1, round(longest * self.settings.random_range_ratio)), longest)

    def call(self, rng: random.Random, prefix: list[int]) -> Call:
        """Random ids behind a prefix, with a random length of the answer."""
        settings = self.settings
        prompt = prefix + self.tokens.draw(rng, self.length(rng, settings.random_input_len))
        params = {"temperature": settings.temperature, "ignore_eos": not settings.disable_ignore_eos}
        if settings.temperature > 0:
            params["sampling_seed"] = rng.randrange(2**31)
        return Call(prompt, self.length(rng, settings.random_output_len), params)


class RandomWorkload(Workload):
    """Prompts that have nothing in common."""

    def program(self, number: int) -> Program:
        call = self.call(self.rng(number), [])
        return lambda caller: caller(call)


class SharedPrefixWorkload(Workload):
    """Prompts in groups; those of a group begin with the same tokens, as with a long instruction or document."""

    def program(self, number: int) -> Program:
        group = number % self.settings.prefix_groups if number >= 0 else "warm-up"
        prefix = self.tokens.draw(self.rng("prefix", group), self.settings.prefix_len)
        call = self.call(self.rng(number), prefix)
        return lambda caller: caller(call)


WORKLOADS: dict[str, type[Workload]] = {"random": RandomWorkload, "shared-prefix": SharedPrefixWorkload}

"""Workloads of single calls: what differs is what their prompts have in common, and how long they are."""

from __future__ import annotations

from losa_server.bench.calls import Program
from losa_server.bench.workload import Workload

SHORTEST_SHARE = 64  # of mixed lengths: the longest is so many times the shortest


class RandomWorkload(Workload):
    """Prompts that have nothing in common: disjoint documents."""

    def program(self, number: int) -> Program:
        call = self.call(self.rng(number), [])
        return lambda caller: caller.call(call)


class SharedPrefixWorkload(Workload):
    """Prompts in groups; those of a group begin with the same tokens: many callers, a question each, few documents."""

    def program(self, number: int) -> Program:
        call = self.call(self.rng(number), self.prefix(number, self.settings.prefix_len))
        return lambda caller: caller.call(call)


class FewShotWorkload(Workload):
    """One system prompt for all, a quarter of the prefix; the rest are examples, of which there is a set per group."""

    def program(self, number: int) -> Program:
        system = max(1, self.settings.prefix_len // 4)
        common = self.source.draw(self.rng("system", number < 0), system)
        call = self.call(self.rng(number), common + self.prefix(number, self.settings.prefix_len - system))
        return lambda caller: caller.call(call)


class MixedLengthsWorkload(Workload):
    """Disjoint prompts of very different lengths, each doubling of the length being equally likely."""

    def program(self, number: int) -> Program:
        rng, longest = self.rng(number), self.settings.random_input_len
        length = max(1, round(longest * SHORTEST_SHARE ** -rng.random()))
        call = self.asking(rng, self.source.draw(rng, length))
        return lambda caller: caller.call(call)

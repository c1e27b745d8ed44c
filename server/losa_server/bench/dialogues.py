"""Workloads whose programs make several calls: one after the other, or side by side."""

from __future__ import annotations

import asyncio

from losa_server.bench.calls import Caller, Program, Record
from losa_server.bench.workload import Workload


class QuestionsWorkload(Workload):
    """A caller asks all its questions about a document at once; documents are shared by the callers of a group."""

    def program(self, number: int) -> Program:
        rng, document = self.rng(number), self.prefix(number, self.settings.prefix_len)
        calls = [self.call(rng, document) for _ in range(self.settings.turns)]

        async def ask(caller: Caller) -> list[Record]:
            return await asyncio.gather(*(caller.call(call) for call in calls))

        return ask


class ChatWorkload(Workload):
    """A conversation: each turn's prompt is all that was said before, the answers among it, and something new.

    It begins with the system prompt of its group, and ends early when a turn was not answered to the end.
    """

    def program(self, number: int) -> Program:
        async def talk(caller: Caller) -> None:
            rng, said = self.rng(number), self.prefix(number, self.settings.prefix_len)
            for _ in range(self.settings.turns):
                call = self.call(rng, said)
                record = await caller.call(call)
                if not record.completed:
                    return
                assert isinstance(call.prompt, list)
                said = call.prompt + record.output_ids

        return talk

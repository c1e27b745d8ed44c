"""The proof that all peers do the same work, then their times, in turn. Knows no peer's inside."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

from benchmarks.peers.peer import Answer, Peer, Prompt, Task


class Differs(Exception):
    """A peer that has to answer like the reference does not; the message says where."""


class Run(NamedTuple):
    """One timed run. tokens: visible ones of all its answers. load: of the machine, over a minute, when it began."""

    peer: str
    requests: int
    seconds: float
    tokens: int
    load: float

    @property
    def speed(self) -> float:
        """Visible tokens per second."""
        return self.tokens / self.seconds


class Race:
    """Peers over the first 1, 8, … of the same prompts. The first peer is the reference for all answers.

    text_of: of token ids, for servers that answer with a text alone. sample: a peer that takes prompts one after
    another and remembers nothing is timed over so many of them at most.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        prompts: Sequence[Prompt],
        task: Task,
        text_of: Callable[[Sequence[int]], str],
        sample: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.peers, self.prompts, self.task, self.sample = peers, prompts, task, sample
        self._text_of, self._clock = text_of, clock
        self.reference: list[Answer] = []
        self.equal: dict[str, float] = {}  # share of answers that are the reference's

    def prove(self, progress: Callable[[str], None]) -> None:
        """Every peer answers every prompt once. Raises Differs, before anything is timed."""
        for peer in self.peers:
            progress(f"{peer.name}: {len(self.prompts)} answers")
            peer.reset()
            found = peer.answer(self.prompts, self.task)
            if not self.reference:
                self.reference = [self._with_text(answer) for answer in found]
            self.equal[peer.name] = self._check(peer, found)

    def run(self, counts: Sequence[int], rounds: int, progress: Callable[[str], None]) -> list[Run]:
        """All peers in turn, as often as there are rounds. Raises Differs if an answer is no longer the proven one."""
        runs = []
        for number in range(rounds):
            for count in counts:
                for peer in self.peers:
                    progress(f"round {number + 1} of {rounds}: {peer.name}, {count} requests")
                    runs.append(self._timed(peer, count))
        return runs

    def _timed(self, peer: Peer, count: int) -> Run:
        prompts = self.prompts[: min(count, self.sample) if peer.alone else count]
        peer.reset()
        load = os.getloadavg()[0]
        began = self._clock()
        found = peer.answer(prompts, self.task)
        seconds = self._clock() - began
        self._check(peer, found)
        return Run(peer.name, count, seconds, sum(answer.tokens for answer in found), load)

    def _with_text(self, answer: Answer) -> Answer:
        if answer.text is not None or answer.token_ids is None:
            return answer
        return answer._replace(text=self._text_of(answer.token_ids))

    def _check(self, peer: Peer, found: Sequence[Answer]) -> float:
        """The share of answers that equal the reference's; of a peer that is exact, all must."""
        pairs = list(zip(found, self.reference, strict=False))
        wrong = [i for i, (mine, theirs) in enumerate(pairs) if not same(mine, theirs)]
        if wrong and peer.exact:
            at = wrong[0]
            raise Differs(
                f"{peer.name} answers prompt {at} with {_shown(found[at])}, {self.peers[0].name} with "
                f"{_shown(self.reference[at])}; {len(wrong)} of {len(pairs)} differ; nothing was timed that would count"
            )
        return 1 - len(wrong) / len(pairs)


def same(mine: Answer, theirs: Answer) -> bool:
    """By token ids where both have them, else by text; and by their number."""
    if mine.token_ids is not None and theirs.token_ids is not None:
        return mine.token_ids == theirs.token_ids
    return mine.text is not None and mine.text == theirs.text and mine.tokens == theirs.tokens


def speeds(runs: Sequence[Run]) -> dict[str, dict[int, float]]:
    """Median visible tokens per second, by peer and number of requests."""
    found: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        found.setdefault(run.peer, {}).setdefault(run.requests, []).append(run.speed)
    return {peer: {count: median(values) for count, values in by.items()} for peer, by in found.items()}


def _shown(answer: Answer) -> str:
    return repr(list(answer.token_ids) if answer.token_ids is not None else answer.text)

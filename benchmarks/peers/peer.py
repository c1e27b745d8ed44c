"""What every competitor is to the benchmark: prompts in, visible tokens out. Knows no model and no server.

A new competitor is one class with `answer`; it is compared with the others before anything is timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """What all have to do: greedy block diffusion.

    steps: planned denoising steps per block. threshold: confidence from which a token is accepted ahead of the plan
    (1.0 = never). stop_ids: they end an answer (and count as its last visible token), unless `ignore_stops`: then they
    are never chosen, and every answer has `max_new_tokens` tokens.
    """

    max_new_tokens: int
    steps: int
    threshold: float
    stop_ids: frozenset[int]
    ignore_stops: bool


class Answer(NamedTuple):
    """Visible tokens of one prompt: up to and including the first stop token. A server may give only one of ids and
    text; tokens: how many they are."""

    tokens: int
    token_ids: tuple[int, ...] | None = None
    text: str | None = None


class Peer(ABC):
    """One way to get the answers.

    exact: whether its answers have to equal the reference's. alone: whether it takes one prompt after another and
    remembers nothing, so that its tokens/s over a few prompts are those over many. cold: whether `reset` makes it
    forget earlier prompts.
    """

    name: str
    exact: bool = True
    alone: bool = False
    cold: bool = True

    def reset(self) -> None:  # noqa: B027 - most remember nothing
        """Forget the prompts seen so far, as if just started. Called before every timed run, outside the time."""

    @abstractmethod
    def answer(self, prompts: Sequence[Prompt], task: Task) -> list[Answer]:
        """All prompts, which arrive at once; the answers in their order."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of what it holds."""


def common_prefix(a: Prompt, b: Prompt) -> int:
    """How many tokens two prompts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def visible(output: Sequence[int], task: Task) -> Answer:
    """The visible part of an output."""
    ends = [] if task.ignore_stops else [i for i, token in enumerate(output) if token in task.stop_ids]
    ids = tuple(output[: ends[0] + 1] if ends else output)
    return Answer(len(ids), ids)

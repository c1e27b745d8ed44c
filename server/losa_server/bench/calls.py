"""The nouns of a load test: a call, and the record of what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Call:
    """One request. prompt: text or token ids. params: sampling parameters. body: further fields of /generate."""

    prompt: str | list[int]
    max_new_tokens: int
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)


class Piece(NamedTuple):
    """News of an answer. at: seconds since the request was sent. tokens: how many were new."""

    at: float
    tokens: int


@dataclass
class Record:
    """What became of one call. started: on the monotonic clock. seconds: until its end. meta: the last meta_info.

    error: why there is no answer; None also for a call that its own program gave up (`abandoned`).
    """

    prompt_len: int
    max_new_tokens: int
    started: float
    seconds: float = 0.0
    pieces: list[Piece] = field(default_factory=list)
    text: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    abandoned: bool = False

    @property
    def completed(self) -> bool:
        """Answered to the end."""
        return self.error is None and not self.abandoned

    @property
    def output_len(self) -> int:
        """Tokens that came."""
        return sum(piece.tokens for piece in self.pieces)

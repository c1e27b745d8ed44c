"""The nouns of a load test: a call, the record of what became of it, and who makes calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True)
class Call:
    """One request. prompt: text or token ids. params: sampling parameters. body: further fields of /generate.

    leave_after: the client hangs up after so many pieces of the answer, 0 as soon as the server has begun to answer;
    None stays to the end.
    """

    prompt: str | list[int]
    max_new_tokens: int
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    leave_after: int | None = None


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
    output_ids: list[int] = field(default_factory=list)
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

    def hear(self, news: Mapping[str, Any], at: float) -> None:
        """Take in an event of the stream, `at` seconds after the request was sent."""
        if "error" in news:
            self.error = str(news["error"].get("message", news["error"]))
            return
        self.meta, self.text = news["meta_info"], news["text"]
        self.output_ids = news.get("output_ids") or []
        tokens = self.meta["completion_tokens"] - self.output_len
        if tokens > 0:
            self.pieces.append(Piece(at, tokens))
        reason = self.meta.get("finish_reason") or {}
        if reason.get("type") in ("abort", "error"):
            self.error = f"ended by the server: {reason.get('message') or reason['type']}"


class Caller(Protocol):
    """What a program is given. One that has a client of its own uses `url` and `api_key`, and adds to `records`."""

    url: str
    api_key: str | None
    records: list[Record]

    async def call(self, call: Call) -> Record:
        """The record of a call that has ended."""


Program = Callable[[Caller], Awaitable[object]]

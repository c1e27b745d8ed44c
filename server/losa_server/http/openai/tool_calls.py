"""Tool calls in a model's text, in the Hermes format: `<tool_call>{"name": …, "arguments": …}</tool_call>`.

A scanner over a growing text, each character looked at a bounded number of times. What is no call of a known tool stays
text, so nothing that the model has said is lost. Knows no stream and no HTTP.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import orjson

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Call(NamedTuple):
    """A call. arguments: a JSON object as text."""

    name: str
    arguments: str


class ToolCallScanner:
    """Splits a text into text and calls. Whitespace around calls is dropped. names: of the tools there are."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._partial = ""  # what may be the beginning of OPEN, or within a call of CLOSE
        self._body: list[str] | None = None  # inside a call: its text so far
        self._space: list[str] = []  # whitespace that is dropped if a call follows
        self._out: list[str | Call] = []
        self.calls = 0

    def push(self, text: str) -> list[str | Call]:
        """What has become certain with more text, in order."""
        text, self._partial = self._partial + text, ""
        at = 0
        while True:
            tag = OPEN if self._body is None else CLOSE
            found = text.find(tag, at)
            if found < 0:
                break
            self._take(text[at:found])
            self._open() if tag is OPEN else self._close(CLOSE)
            at = found + len(tag)
        keep = _overlap(text[at:][-len(tag) :], tag)
        end = len(text) - keep
        self._take(text[at:end])
        self._partial = text[end:]
        return self._flush()

    def finish(self) -> list[str | Call]:
        """What is left at the end of the text. A call that lacks only its closing tag is one."""
        self._take(self._partial)
        self._partial = ""
        if self._body is not None:
            self._close("")
        if not self.calls:
            self._out.append("".join(self._space))
        return self._flush()

    def _take(self, text: str) -> None:
        if self._body is not None:
            self._body.append(text)
            return
        said = text.rstrip()
        if said:
            self._out.append("".join(self._space) + said)
            self._space = []
        self._space.append(text[len(said) :])

    def _open(self) -> None:
        self._body = []

    def _close(self, tag: str) -> None:
        assert self._body is not None
        body, self._body = "".join(self._body), None
        call = self._parse(body)
        if call is None:
            self._take(OPEN + body + tag)
        else:
            self._out.append(call)
            self._space = []
            self.calls += 1

    def _parse(self, body: str) -> Call | None:
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", {})
        if not isinstance(arguments, dict):
            return None
        return Call(value["name"], orjson.dumps(arguments).decode())

    def _flush(self) -> list[str | Call]:
        """Text in one piece between calls, without empty ones."""
        merged: list[str | Call] = []
        for piece in self._out:
            if isinstance(piece, str) and merged and isinstance(merged[-1], str):
                merged[-1] += piece
            elif piece:
                merged.append(piece)
        self._out = []
        return merged


def _overlap(tail: str, tag: str) -> int:
    """Length of the longest end of `tail` that begins `tag`."""
    return next((n for n in range(min(len(tail), len(tag) - 1), 0, -1) if tag.startswith(tail[-n:])), 0)

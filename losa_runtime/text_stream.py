"""From final tokens to final text: stop strings are found across token and block borders, and nothing is taken back.

Text is handed out only when it cannot belong to a stop string any more. The stop that counts is the one that is
complete first, character by character; of several complete at the same character the longest. So the result does not
depend on how the text was cut into tokens, nor the tokens into pushes. Knows no request and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Detokenizes(Protocol):
    """Turns a request's tokens, in order, into text that is never revised."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that became final with these tokens."""

    def flush(self) -> str:
        """What is still held (an unfinished character); called once, at the end."""


class StreamedText(NamedTuple):
    """What one push has settled.

    text: new final text. consumed: how many of this push's tokens were needed to complete the stop string, and matched
    the stop string; both None while none is found. consumed is 0 if only text held from earlier pushes completed it.
    """

    text: str
    consumed: int | None = None
    matched: str | None = None


class TextStream:
    """One request's text. Owns its detokenizer. After a stop was found, or `final`, nothing more may be pushed.

    stop: non-empty strings. no_stop_trim: the text keeps the stop string itself; what follows it is dropped always.
    """

    def __init__(self, detokenizer: Detokenizes, stop: tuple[str, ...] = (), no_stop_trim: bool = False) -> None:
        assert all(stop), "an empty stop string would stop everything"
        self._detokenizer = detokenizer
        # Longest first: the first of several matches at one character is then the one to report.
        self._matchers = [_Matcher(s) for s in sorted(set(stop), key=lambda s: (-len(s), s))]
        self._no_stop_trim = no_stop_trim
        self._held = ""
        self._ended = False

    def push(self, ids: Sequence[int], final: bool = False) -> StreamedText:
        """Take newly final tokens; `final` says that they are the last ones and releases everything held."""
        assert not self._ended, "push after the end of the text"
        self._ended = final
        if not self._matchers:
            text = self._detokenizer.push(ids)
            return StreamedText(text + self._detokenizer.flush() if final else text)
        released = []
        # One token at a time, so that the token with which a stop string is complete is known.
        for number, token in enumerate(ids, start=1):
            text, matched = self._feed(self._detokenizer.push((token,)))
            released.append(text)
            if matched is not None:
                self._ended = True
                return StreamedText("".join(released), number, matched)
        if final:
            text, matched = self._feed(self._detokenizer.flush())
            released.append(text)
            if matched is not None:
                return StreamedText("".join(released), len(ids), matched)
            released.append(self._held)
            self._held = ""
        return StreamedText("".join(released))

    def _feed(self, piece: str) -> tuple[str, str | None]:
        """(text that is final now, the stop string that is complete)."""
        pending = self._held + piece
        for end, char in enumerate(piece, start=len(self._held) + 1):
            # Every matcher must see every character, so this is a list and not a lazy search.
            complete = [m for m in self._matchers if m.advance(char)]
            if complete:
                stop = complete[0].pattern
                self._held = ""
                return pending[: end if self._no_stop_trim else end - len(stop)], stop
        cut = len(pending) - max(m.matched for m in self._matchers)
        self._held = pending[cut:]
        return pending[:cut], None


class _Matcher:
    """Knuth, Morris and Pratt's automaton: `matched` is the longest suffix of the text that begins the pattern."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.matched = pattern, 0
        self._fallback = [0] * len(pattern)
        length = 0
        for i in range(1, len(pattern)):
            while length and pattern[i] != pattern[length]:
                length = self._fallback[length - 1]
            length += pattern[i] == pattern[length]
            self._fallback[i] = length

    def advance(self, char: str) -> bool:
        """Take one character; True when the pattern is complete, after which the matcher is not used again."""
        while self.matched and self.pattern[self.matched] != char:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self.pattern[self.matched] == char
        return self.matched == len(self.pattern)

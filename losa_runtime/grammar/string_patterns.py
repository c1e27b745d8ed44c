"""The `pattern` of a JSON Schema as part of a JSON string: found anywhere unless anchored, never an escaped character.

What such a pattern may match is a decoded string, what is written is an encoded one. So quotation marks, backslashes
and control characters are taken out of every class, and a pattern that asks for one of them by name is refused.
"""

from __future__ import annotations

import re

SAFE = r'[^"\\\x00-\x1f]'
CHARACTER = r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])'
ALLOWED = "a pattern without quotation marks, backslashes, control characters, inner anchors, \\S, \\W and \\D"
_SHORT = {"s": " ", "d": "0-9", "w": "0-9A-Za-z_"}  # of white space, JSON leaves only this unescaped in ASCII
_REFUSED = frozenset('\\"ntrfv0SWDxucpPbBAzZkG123456789')


class UnsupportedPattern(ValueError):
    """The text says what is allowed."""


def inside_string(pattern: str) -> str:
    """The regular expression between the quotation marks. Raises UnsupportedPattern."""
    free = f"{CHARACTER}*"
    body = pattern.removeprefix("^")
    ends = body.endswith("$") and not re.search(r"(?<!\\)(?:\\\\)*\\\$$", body)
    before, after = "" if body != pattern else free, "" if ends else free
    body = body[:-1] if ends else body
    if (before or after) and _has_open_bar(body):
        raise UnsupportedPattern("anchors around the whole of it: ^(a|b)$")
    return f"{before}(?:{_Reader(body).read()}){after}"


def _has_open_bar(pattern: str) -> bool:
    """Whether a | stands outside of all brackets."""
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "", pattern)
    depth = 0
    for character in plain:
        depth += (character == "(") - (character == ")")
        if character == "|" and depth == 0:
            return True
    return False


class _Reader:
    """One pass over a pattern, which writes it again."""

    def __init__(self, body: str) -> None:
        self._body, self._at = body, 0

    def read(self) -> str:
        """The whole pattern."""
        written = []
        while self._at < len(self._body):
            part = self._next()
            if part == "[":
                written.append(self._class())
            elif part == ".":
                written.append(SAFE)
            elif part in ("^", "$"):
                raise UnsupportedPattern(ALLOWED)
            elif part[0] == "\\" and part[1] in _SHORT:
                written.append(f"[{_SHORT[part[1]]}]")
            else:
                written.append("/" if part == r"\/" else part)
        return "".join(written)

    def _next(self) -> str:
        """A character, or a backslash and what it stands before."""
        part = self._body[self._at : self._at + (2 if self._body[self._at] == "\\" else 1)]
        self._at += len(part)
        if part in ("\\", '"') or part[0] < " " or (part[0] == "\\" and part[1] in _REFUSED):
            raise UnsupportedPattern(ALLOWED)
        return part

    def _class(self) -> str:
        """What follows a [ up to its ]."""
        negated = self._body[self._at : self._at + 1] == "^"
        self._at += negated
        written = [r'^"\\\x00-\x1f'] if negated else []
        first = True
        while True:
            if self._at >= len(self._body):
                raise UnsupportedPattern("closed brackets")
            part = self._next()
            if part == "]" and not first:
                return f"[{''.join(written)}]"
            first = False
            if part == "[" or (part in ("&", "~", "-") and self._body[self._at : self._at + 1] == part):
                raise UnsupportedPattern("classes without classes inside them")
            if part[0] == "\\" and part[1] in _SHORT:
                written.append(_SHORT[part[1]])
            elif self._body[self._at : self._at + 1] == "-" and self._body[self._at + 1 : self._at + 2] not in (
                "",
                "]",
            ):
                self._at += 1
                written.append(_range(part[-1], self._next()[-1]))
            else:
                written.append(_member(part[-1]))


def _member(character: str) -> str:
    return f"\\{character}" if character in r"\^[]-&~" else character


def _range(low: str, high: str) -> str:
    """A range, without what JSON escapes."""
    if low > high:
        raise UnsupportedPattern(f"ranges that ascend, not {low}-{high}")
    parts, start = [], low
    for hole in ('"', "\\"):
        if start <= hole <= high:
            if start < hole:
                parts.append(f"{_member(start)}-{_member(chr(ord(hole) - 1))}")
            start = chr(ord(hole) + 1)
    if start <= high:
        parts.append(f"{_member(start)}-{_member(high)}")
    return "".join(parts)

"""Text that users wrote stays text, also where it spells a special token.

Before rendering, each place in a user's strings at which a special token could begin gets a stand-in character that
occurs nowhere else. After rendering, the text is cut behind those of these places where a special token stands indeed:
tokenized piece by piece, it is not recognised there, while those that the template itself has written are. Without
such a place there is one piece, and the tokens are the very same as without this room. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from losa_runtime.core.errors import InvalidRequest

_STAND_INS = range(0xF0000, 0x10FFFE)  # the private-use planes: more characters than anybody can use up


class Guarded(NamedTuple):
    """value: what came in, with stand-ins. stand_ins: stand-in -> the character that it stands for."""

    value: Any
    stand_ins: Mapping[str, str]


def guard(value: Any, specials: Sequence[str]) -> Guarded:
    """Mark the places in all strings of a JSON value, keys included, at which one of `specials` could begin.

    Marked is the first character of whatever agrees with a special token in two characters, or up to the string's end:
    a template may join strings, or take something out of the middle of one.
    """
    places = _places(specials)
    if places is None or not _found(value, places):
        return Guarded(value, {})
    used = set().union(*map(set, _strings(value)))
    free = (chr(code) for code in _STAND_INS if chr(code) not in used)
    stand_in = {first: next(free) for first in sorted({text[0] for text in specials if text})}
    marked = _map(value, lambda text: places.sub(lambda match: stand_in[match.group()], text))
    return Guarded(marked, {mark: first for first, mark in stand_in.items()})


def cut(rendered: str, stand_ins: Mapping[str, str], specials: Sequence[str]) -> list[str]:
    """The rendered text in pieces, stand-ins taken back. Raises InvalidRequest for what cannot be cut apart."""
    if not any(mark in rendered for mark in stand_ins):
        return [rendered]
    text = rendered.translate({ord(mark): first for mark, first in stand_ins.items()})
    marks = re.compile("|".join(map(re.escape, stand_ins)))
    candidates = tuple(specials)
    pieces, start = [], 0
    for match in marks.finditer(rendered):
        if not text.startswith(candidates, match.start()):
            continue
        if text[match.start()] in candidates:
            allowed = f"text without the special token {text[match.start()]!r}, which is one character long"
            raise InvalidRequest("messages", "that token", allowed)
        pieces.append(text[start : match.end()])
        start = match.end()
    return [*pieces, text[start:]]


def _places(specials: Sequence[str]) -> re.Pattern[str] | None:
    """Where a special token could begin: its first character, before its second or at the end of the string."""
    seconds: dict[str, set[str]] = {}
    for text in filter(None, specials):
        seconds.setdefault(text[0], set()).add(re.escape(text[1:2]))
    if not seconds:
        return None
    ways = (f"{re.escape(first)}(?:(?={'|'.join(sorted(next_))})|\\Z)" for first, next_ in sorted(seconds.items()))
    return re.compile("|".join(ways))


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item)]
    return []


def _found(value: Any, places: re.Pattern[str]) -> bool:
    return any(places.search(text) for text in _strings(value))


def _map(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map(key, change): _map(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map(item, change) for item in value]
    return value

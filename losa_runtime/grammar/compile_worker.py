"""The process that compiles patterns, so that one that explodes takes nothing else with it.

Started by `compiler` as `python -m losa_runtime.grammar.compile_worker MEMORY_BYTES`: reads `{"pattern": …, "without":
[…]}`, a line of JSON, and answers `{"size": n}` and n bytes of automaton, or `{"error": …}`. Memory is bounded here,
time by whoever waits. The regular expressions are those of Rust's `regex` (no look-around, no back-references),
compiled by outlines_core over a vocabulary of single bytes. Of the digits and letters that `\\d` and `\\w` stand for,
those are taken that this Python knows, too: its Unicode tables may be older, and whoever checks an output with `re`
must find that it matches.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from losa_runtime.grammar.automaton import ByteAutomaton

if TYPE_CHECKING:
    from outlines_core import Vocabulary

MAX_EDGES = 4_000_000
# Stands behind every pattern while it is compiled: outlines_core 0.2.14 loses what may follow a state where a match may
# end, if it begins with a byte above 127. The last code point there is, and no character; no match ever contains it.
MARK = chr(0x10FFFF)


Edges = dict[int, dict[int, int]]


def compile_pattern(pattern: str, without: Sequence[str] = ()) -> ByteAutomaton:
    """The automaton of a pattern, which is matched as a whole by texts that hold none of the strings `without`.

    Raises ValueError with the reason.
    """
    from outlines_core import Index, Vocabulary

    single_bytes = Vocabulary(256, {bytes((byte,)): [byte] for byte in range(256)})
    Index(pattern, single_bytes)  # it must be a pattern by itself: `a)(b` is none
    index = Index(f"(?:{_as_python_reads_it(pattern, single_bytes)}){MARK}", single_bytes)
    edges: Edges = index.get_transitions()
    _check_size(sum(map(len, edges.values())))
    marked = set(index.get_final_states())
    accepting = {state for state in edges if state not in marked and _behind(edges, state, MARK.encode()) in marked}
    inside = {
        state: {byte: to for byte, to in row.items() if to not in marked}
        for state, row in edges.items()
        if state not in marked
    }
    start = index.get_initial_state()
    if without:
        inside, start, accepting = _without(inside, start, accepting, [text.encode() for text in without])
    return ByteAutomaton.from_edges(inside, start, accepting)


def _as_python_reads_it(pattern: str, single_bytes: Vocabulary) -> str:
    """The pattern with `\\d` and `\\w` cut down to what both call digits and letters; not where it is told to match
    bytes without Unicode (`(?-u)`), which is ASCII for both."""
    from outlines_core import Index

    if re.search(r"\(\?[a-zA-Z]*-[a-zA-Z]*u", pattern):
        return pattern
    age = r"\p{age:" + ".".join(unicodedata.unidata_version.split(".")[:2]) + "}"
    try:
        Index(age, single_bytes)
    except ValueError:  # a Python whose tables are newer than the library's has nothing to take away
        age = r"\p{any}"
    shorter = {r"\d": rf"[\d&&{age}]", r"\w": rf"[\w&&[\p{{L}}\p{{N}}_]&&{age}]"}
    return re.sub(r"\\.", lambda escaped: shorter.get(escaped[0], escaped[0]), pattern, flags=re.DOTALL)


def _check_size(size: int) -> None:
    if size > MAX_EDGES:
        raise ValueError(f"its automaton has {size} edges, allowed: at most {MAX_EDGES}")


def _without(edges: Edges, start: int, accepting: set[int], texts: Sequence[bytes]) -> tuple[Edges, int, set[int]]:
    """An automaton that goes along and knows how much of one of the texts has just been read; none is ever finished."""
    progress = _Progress(texts)
    numbers = {(start, b""): 0}
    todo, made, size = [(start, b"")], dict[int, dict[int, int]](), 0
    for state, read in todo:
        row = made.setdefault(numbers[state, read], {})
        for byte, target in edges.get(state, {}).items():
            behind = progress.behind(read, byte)
            if behind is None:
                continue
            if (target, behind) not in numbers:
                numbers[target, behind] = len(numbers)
                todo.append((target, behind))
            row[byte] = numbers[target, behind]
        size += len(row)
        _check_size(size)
    return made, 0, {number for (state, _), number in numbers.items() if state in accepting}


class _Progress:
    """The longest end of what was read that begins one of some texts."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._texts = texts
        self._beginnings = {text[:length] for text in texts for length in range(len(text))}
        self._known: dict[tuple[bytes, int], bytes | None] = {}

    def behind(self, read: bytes, byte: int) -> bytes | None:
        """That behind one more byte; None if a text is then complete."""
        key = (read, byte)
        if key not in self._known:
            text = read + bytes((byte,))
            ended = any(text.endswith(whole) for whole in self._texts)
            ends = (text[start:] for start in range(len(text) + 1))
            self._known[key] = None if ended else next(end for end in ends if end in self._beginnings)
        return self._known[key]


def _behind(edges: Edges, state: int | None, text: bytes) -> int | None:
    for byte in text:
        state = None if state is None else edges.get(state, {}).get(byte)
    return state


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the other side closes."""
    for line in requests:
        head: dict[str, Any]
        body = b""
        try:
            asked = json.loads(line)
            body = compile_pattern(asked["pattern"], asked["without"]).to_bytes()
            head = {"size": len(body)}
        except (ValueError, OverflowError) as error:
            head = {"error": str(error)}
        answers.write(json.dumps(head).encode() + b"\n" + body)
        answers.flush()


if __name__ == "__main__":
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)

"""The process that compiles patterns, so that one that explodes takes nothing else with it.

Started by `compiler` as `python -m losa_runtime.grammar.compile_worker MEMORY_BYTES`: reads `{"pattern": …}`, a line of
JSON, and answers `{"size": n}` and n bytes of automaton, or `{"error": …}`. Memory is bounded here, time by whoever
waits. The regular expressions are those of Rust's `regex` (no look-around, no back-references), compiled by
outlines_core over a vocabulary of single bytes.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any, BinaryIO

from losa_runtime.grammar.automaton import ByteAutomaton

MAX_EDGES = 4_000_000
# Stands behind every pattern while it is compiled: outlines_core 0.2.14 loses what may follow a state where a match may
# end, if it begins with a byte above 127. The last code point there is, and no character; no match ever contains it.
MARK = chr(0x10FFFF)


def compile_pattern(pattern: str) -> ByteAutomaton:
    """The automaton of a pattern, which is matched as a whole. Raises ValueError with the reason."""
    from outlines_core import Index, Vocabulary

    single_bytes = Vocabulary(256, {bytes((byte,)): [byte] for byte in range(256)})
    Index(pattern, single_bytes)  # it must be a pattern by itself: `a)(b` is none
    index = Index(f"(?:{pattern}){MARK}", single_bytes)
    edges: dict[int, dict[int, int]] = index.get_transitions()
    size = sum(map(len, edges.values()))
    if size > MAX_EDGES:
        raise ValueError(f"its automaton has {size} edges, allowed: at most {MAX_EDGES}")
    marked = set(index.get_final_states())
    accepting = {state for state in edges if state not in marked and _behind(edges, state, MARK.encode()) in marked}
    inside = {
        state: {byte: to for byte, to in row.items() if to not in marked}
        for state, row in edges.items()
        if state not in marked
    }
    return ByteAutomaton.from_edges(inside, index.get_initial_state(), accepting)


def _behind(edges: dict[int, dict[int, int]], state: int | None, text: bytes) -> int | None:
    for byte in text:
        state = None if state is None else edges.get(state, {}).get(byte)
    return state


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the other side closes."""
    for line in requests:
        head: dict[str, Any]
        body = b""
        try:
            body = compile_pattern(json.loads(line)["pattern"]).to_bytes()
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

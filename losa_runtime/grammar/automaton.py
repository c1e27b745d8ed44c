"""A regular language over bytes as a table: which byte leads where, and how far a state is from the end.

Made once per pattern (`compiler`), read by everything else here. Knows no tokens, no model and no request.
S states, C classes of bytes that no state tells apart.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

MAGIC = b"losa-automaton-1\n"


@dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """A deterministic automaton. Every state can be reached, and from every state the end can be reached.

    next_SC: int32 [S, C], the state behind a byte of a class, -1 = no match can begin like this. class_B: uint8 [256].
    accepting_S: bool [S]. State 0 is where a match begins.
    """

    next_SC: NDArray[np.int32]
    class_B: NDArray[np.uint8]
    accepting_S: NDArray[np.bool_]

    @property
    def states(self) -> int:
        """S."""
        return int(self.next_SC.shape[0])

    def walk(self, text: bytes, state: int = 0) -> int:
        """The state behind some bytes, -1 if they cannot follow."""
        for byte in text:
            if state < 0:
                return -1
            state = int(self.next_SC[state, self.class_B[byte]])
        return state

    @cached_property
    def bytes_left_S(self) -> NDArray[np.int32]:
        """int32 [S]: the fewest bytes from each state to an accepting one."""
        source, kind = np.nonzero(self.next_SC >= 0)
        target = self.next_SC[source, kind]
        order = np.argsort(target, kind="stable")
        source, first = source[order], np.searchsorted(target[order], np.arange(self.states + 1))
        left = np.where(self.accepting_S, 0, -1).astype(np.int32)
        layer, distance = np.flatnonzero(self.accepting_S), 0
        while layer.size:
            distance += 1
            before = np.unique(np.concatenate([source[first[s] : first[s + 1]] for s in layer]))
            layer = before[left[before] < 0]
            left[layer] = distance
        return left

    def to_bytes(self) -> bytes:
        """For a pipe or a socket."""
        head = json.dumps({"states": self.states, "classes": int(self.next_SC.shape[1])}).encode()
        parts = (self.next_SC.astype("<i4"), self.class_B, self.accepting_S.astype(np.uint8))
        return MAGIC + head + b"\n" + b"".join(part.tobytes() for part in parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> ByteAutomaton:
        """What `to_bytes` gave. Raises ValueError for anything else."""
        if not data.startswith(MAGIC):
            raise ValueError("an automaton of another version, or none")
        head, _, body = data[len(MAGIC) :].partition(b"\n")
        sizes = json.loads(head)
        states, classes = int(sizes["states"]), int(sizes["classes"])
        if states < 1 or not 1 <= classes <= 256 or len(body) != states * classes * 4 + 256 + states:
            raise ValueError(f"an automaton of {states} states and {classes} classes in {len(body)} bytes")
        table = np.frombuffer(body, "<i4", states * classes).reshape(states, classes).astype(np.int32)
        kinds = np.frombuffer(body, np.uint8, 256, states * classes * 4)
        accepting = np.frombuffer(body, np.uint8, states, states * classes * 4 + 256).astype(bool)
        if table.min(initial=0) < -1 or table.max(initial=0) >= states or int(kinds.max()) >= classes:
            raise ValueError("an automaton that leads out of itself")
        return cls(table, kinds, accepting)

    @classmethod
    def from_edges(cls, edges: dict[int, dict[int, int]], start: int, accepting: set[int]) -> ByteAutomaton:
        """From state -> byte -> state with any numbers for states. States on no path from start to end are dropped.

        Raises ValueError if nothing can match.
        """
        alive = _reaching(edges, accepting)
        if start not in alive:
            raise ValueError("a pattern that nothing can match")
        number = {start: 0}
        order = [start]
        for state in order:
            for target in edges.get(state, {}).values():
                if target in alive and target not in number:
                    number[target] = len(order)
                    order.append(target)
        table = np.full((len(order), 256), -1, dtype=np.int32)
        for state in order:
            for byte, target in edges.get(state, {}).items():
                if target in alive:
                    table[number[state], byte] = number[target]
        columns, kinds = np.unique(table, axis=1, return_inverse=True)
        ends = np.array([state in accepting for state in order])
        return cls(np.ascontiguousarray(columns), kinds.astype(np.uint8), ends)


def _reaching(edges: dict[int, dict[int, int]], accepting: set[int]) -> set[int]:
    """States from which an accepting one can be reached."""
    before: dict[int, set[int]] = {}
    for state, row in edges.items():
        for target in row.values():
            before.setdefault(target, set()).add(state)
    alive, todo = set(accepting), list(accepting)
    while todo:
        for state in before.get(todo.pop(), ()):
            if state not in alive:
                alive.add(state)
                todo.append(state)
    return alive

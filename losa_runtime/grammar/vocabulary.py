"""The tokens of a model as text bytes, laid out so that many of them can be led through an automaton at once.

V token ids, N tokens with text, in the order of their first byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from losa_runtime.grammar.automaton import ByteAutomaton

Ids = NDArray[np.int64]


class Vocabulary:
    """pieces: the bytes of each id; ids with none (special tokens, MASK, padding) cannot be part of a match.

    longest: bytes of the longest token. covers_bytes: every single byte is a token of its own, as in byte-level BPE.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.size = len(pieces)
        ids = sorted((i for i, piece in enumerate(pieces) if piece), key=lambda i: (pieces[i][0], len(pieces[i]), i))
        self._ids: Ids = np.array(ids, dtype=np.int64)
        self._lengths = np.array([len(pieces[i]) for i in ids], dtype=np.int64)
        self._starts = np.concatenate(([0], np.cumsum(self._lengths)))
        self._bytes = np.frombuffer(b"".join(pieces[i] for i in ids), dtype=np.uint8)
        firsts = self._bytes[self._starts[:-1]] if ids else np.empty(0, dtype=np.uint8)
        self._first = np.searchsorted(firsts, np.arange(257))  # tokens of first byte b: _first[b] to _first[b + 1]
        self._place = np.full(self.size, -1, dtype=np.int64)
        self._place[self._ids] = np.arange(len(ids))
        self.longest = int(self._lengths.max(initial=0))
        self.covers_bytes = len({pieces[i] for i in ids if len(pieces[i]) == 1}) == 256

    def from_state(self, automaton: ByteAutomaton, state: int) -> tuple[Ids, Ids]:
        """All tokens that may follow in a state, and the states behind them: (ids, states)."""
        live = automaton.next_SC[state, automaton.class_B] >= 0
        spans = [np.arange(self._first[b], self._first[b + 1]) for b in np.flatnonzero(live)]
        places = np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)
        behind = self._lead(automaton, np.full(places.shape, state, dtype=np.int64), places)
        found = behind >= 0
        return self._ids[places[found]], behind[found]

    def follow(self, automaton: ByteAutomaton, states: Ids, ids: Ids) -> Ids:
        """The state behind each token from each state, -1 where it cannot follow: int64 [len(states), len(ids)]."""
        places = self._place[ids]
        grid = np.broadcast_to(places, (len(states), len(ids))).ravel()
        behind = np.where(grid >= 0, np.repeat(states, len(ids)), -1)
        return self._lead(automaton, behind, grid).reshape(len(states), len(ids))

    def _lead(self, automaton: ByteAutomaton, state: Ids, places: Ids) -> Ids:
        """Each token from its state, byte by byte; what can go no further is not looked at again."""
        table, kinds = automaton.next_SC, automaton.class_B
        live = np.flatnonzero(state >= 0)
        depth = 0
        while live.size:
            live = live[self._lengths[places[live]] > depth]
            byte = self._bytes[self._starts[places[live]] + depth]
            state[live] = table[state[live], kinds[byte]]
            live = live[state[live] >= 0]
            depth += 1
        return state

"""An automaton over tokens, made row by row when a state is first met: no table of states times vocabulary.

Behind the states of the bytes there is one more, `done`, entered by the tokens that end an output and never left: what
a block holds behind them is cut off. Knows no block and no probabilities. V vocabulary.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from losa_runtime.grammar.automaton import ByteAutomaton
from losa_runtime.grammar.vocabulary import Vocabulary

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]
NOWHERE = -1
FAR = 2**31 - 1
REMEMBERED_BYTES = 128 << 20  # of rows, per automaton; then all are forgotten. A block that needs more is refused
REMEMBERED_LAYERS, REMEMBERED_STEPS = 512, 4096
WIDE = 4096  # tokens


class Shape:
    """Tokens in groups that lead to the same state, whatever that is: group g is ids[starts[g] : starts[g + 1]], the
    last one goes to the end. States that count something have equal shapes, and so share one. digest: of both."""

    def __init__(self, ids: NDArray[np.int32], starts: Ids, vocabulary_size: int, digest: bytes) -> None:
        self.ids, self.starts, self._size, self.digest = ids, starts, vocabulary_size, digest
        self.wide = ids.size > WIDE

    @cached_property
    def group_of_id(self) -> Ids:
        """The group of each of `ids`."""
        return np.repeat(np.arange(self.starts.size), np.diff(np.append(self.starts, self.ids.size)))

    @cached_property
    def group_V(self) -> NDArray[np.int32]:
        """int32 [V]: the group of each id, -1 = in none. For wide shapes, of which few ids are asked."""
        found = np.full(self._size, -1, dtype=np.int32)
        found[self.ids] = self.group_of_id
        return found

    @property
    def bytes(self) -> int:
        """What it takes, about."""
        return self.ids.nbytes * 3 + (4 * self._size if self.wide else 0)

    @property
    def counted_bytes(self) -> int:
        """What it counts of the most that a block may need: as in C++, where it takes that."""
        return 4 * (self.ids.size + self.starts.size + 1 + (self._size if self.wide else 0))


class ShapeRoom:
    """How many bytes of distinct shapes there may still be."""

    def __init__(self, limit: int) -> None:
        self._limit, self._left = limit, limit
        self._seen: set[bytes] = set()

    def take(self, shape: Shape) -> None:
        """Take a shape off it, if it was not yet. Raises ValueError where there is no room left."""
        if shape.digest not in self._seen:
            self._seen.add(shape.digest)
            self._left -= shape.counted_bytes
        if self._left < 0:
            raise ValueError(f"the states of a block have more than {self._limit} bytes of tokens")


class TokenRow(NamedTuple):
    """What may follow in a state: group g of the shape leads to targets[g], ascending."""

    shape: Shape
    targets: Ids


class Layer:
    """The rows of some states, one behind the other, so that all of them are gone through at once; groups of equal
    shapes are counted once. m states, e edges (groups of all rows), g groups of the distinct shapes."""

    def __init__(self, states: Ids, rows: list[TokenRow]) -> None:
        self.states, self._rows = states, rows
        edges = np.array([row.targets.size for row in rows], dtype=np.int64)
        self.first_m: Ids = np.cumsum(edges) - edges  # first edge of each state
        self.targets_e: Ids = np.concatenate([row.targets for row in rows])
        self.behind: Ids = np.unique(self.targets_e)
        self.shapes: dict[int, tuple[Shape, int]] = {}  # by identity, with the number of the first group
        groups = 0
        for row in rows:
            if id(row.shape) not in self.shapes:
                self.shapes[id(row.shape)] = (row.shape, groups)
                groups += row.targets.size
        self.groups = groups
        self.group_e: Ids = np.concatenate([self.shapes[id(r.shape)][1] + np.arange(r.targets.size) for r in rows])

    def any_of(self, good_S: Flags) -> Flags:
        """bool [m]: the states that lead to a good one."""
        found: Flags = np.logical_or.reduceat(good_S[self.targets_e], self.first_m)
        return found

    def used(self, here_S: Flags, behind_S: Flags) -> Flags:
        """bool [g]: the groups that lead from a good state to a good one."""
        edges = np.diff(np.append(self.first_m, self.targets_e.size))
        used = np.repeat(here_S[self.states], edges) & behind_S[self.targets_e]
        found = np.zeros(self.groups, dtype=bool)
        found[self.group_e[used]] = True
        return found

    @cached_property
    def narrow(self) -> tuple[NDArray[np.int32], Ids, Ids]:
        """Of the shapes that are not wide: all ids, where each group begins among them, and the group's number."""
        mine = [(shape, first) for shape, first in self.shapes.values() if not shape.wide]
        nothing = np.empty(0, dtype=np.int64)
        if not mine:
            return nothing.astype(np.int32), nothing, nothing
        sizes = np.array([shape.ids.size for shape, _ in mine])
        shifts = np.cumsum(sizes) - sizes
        starts = [shape.starts + shift for (shape, _), shift in zip(mine, shifts, strict=True)]
        numbers = [first + np.arange(shape.starts.size) for shape, first in mine]
        return np.concatenate([shape.ids for shape, _ in mine]), np.concatenate(starts), np.concatenate(numbers)

    @cached_property
    def wide(self) -> list[tuple[Shape, slice]]:
        """The wide shapes and their groups."""
        every = self.shapes.values()
        return [(shape, slice(first, first + shape.starts.size)) for shape, first in every if shape.wide]


class TokenAutomaton:
    """A byte automaton seen through a vocabulary. ends: ids that end an output where it may end. limit: bytes of rows
    that are remembered, and that a block may need at once."""

    def __init__(
        self,
        automaton: ByteAutomaton,
        vocabulary: Vocabulary,
        ends: frozenset[int],
        limit: int = REMEMBERED_BYTES,
    ) -> None:
        self.automaton, self.vocabulary, self.limit = automaton, vocabulary, limit
        self.ends: Ids = np.array(sorted(ends), dtype=np.int64)
        self.done = automaton.states
        self._rows: dict[int, TokenRow] = {}
        self._shapes: dict[bytes, Shape] = {}
        self._layers: dict[bytes, Layer] = {}
        self._steps: dict[tuple[bytes, int], Ids] = {}
        self._remembered = 0
        self._left: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """What it holds, about."""
        return self.automaton.next_SC.nbytes + self._remembered

    def row(self, state: int) -> TokenRow:
        """All that may follow in a state."""
        found = self._rows.get(state)
        if found is None:
            if self._remembered > self.limit:
                self._rows, self._shapes, self._layers, self._remembered = {}, {}, {}, 0
            found = self._rows[state] = self._make(state)
            self._remembered += 256 + found.targets.nbytes
        return found

    def layer(self, states: Ids) -> Layer:
        """The rows of some states, ascending and without `done`."""
        key = states.tobytes()
        found = self._layers.get(key)
        if found is None:
            room, rows = ShapeRoom(self.limit), []
            for state in states:
                rows.append(self.row(int(state)))
                room.take(rows[-1].shape)
            found = Layer(states, rows)
            if len(self._layers) >= REMEMBERED_LAYERS:
                self._layers = {}
            self._layers[key] = found
        return found

    def step(self, state: int, token: int) -> int:
        """The state behind a token, or NOWHERE."""
        return int(self.steps(np.array([state]), token)[0])

    def steps(self, states: Ids, token: int) -> Ids:
        """The same for several states. Remembered: a block's known tokens are stepped on in each of its steps."""
        key = (states.tobytes(), token)
        found = self._steps.get(key)
        if found is None:
            if len(self._steps) >= REMEMBERED_STEPS:
                self._steps = {}
            found = self._steps[key] = self._behind(states, token)
        return found

    def _behind(self, states: Ids, token: int) -> Ids:
        done = states == self.done
        if token in self.ends:
            ending = done | np.append(self.automaton.accepting_S, True)[states]
            return np.where(ending, self.done, NOWHERE)
        found = np.full(states.shape, self.done)
        found[~done] = self.vocabulary.follow(self.automaton, states[~done], np.array([token]))[:, 0]
        return found

    def walk(self, tokens: Ids, state: int = 0) -> int:
        """The state behind some tokens, or NOWHERE."""
        for token in tokens.tolist():
            if state == NOWHERE:
                break
            state = self.step(state, token)
        return state

    def accepting(self, state: int) -> bool:
        """Whether an output may end here."""
        return state == self.done or bool(self.automaton.accepting_S[state])

    def can_finish(self, state: int, room: int) -> bool:
        """Whether at most `room` further tokens lead to where an output may end."""
        if self.accepting(state):
            return True
        left = int(self.automaton.bytes_left_S[state])
        if left > room * self.vocabulary.longest:
            return False
        if left <= room and self.vocabulary.covers_bytes:
            return True
        return self.tokens_left(state) <= room

    def tokens_left(self, state: int) -> int:
        """The fewest tokens from a state to where an output may end; FAR if none do."""
        if state not in self._left:
            self._left[state] = self._search(state)
        return self._left[state]

    def _search(self, state: int) -> int:
        """Breadth first; states whose distance is known are not searched again."""
        layer, seen, depth, best = [state], {state}, 0, FAR
        while layer and depth < best:
            known = [depth + self._left[s] for s in layer if s in self._left and self._left[s] < FAR]
            best = min([best, *known, *(depth for s in layer if self.accepting(s))])
            depth += 1
            behind = {int(t) for s in layer if s not in self._left for t in self.row(s).targets}
            layer = [s for s in behind - seen if s != self.done]
            seen.update(layer)
        return best

    def _make(self, state: int) -> TokenRow:
        ids, behind = self.vocabulary.from_state(self.automaton, state)
        usable = ~np.isin(ids, self.ends)
        ids, behind = ids[usable], behind[usable]
        if self.accepting(state) and self.ends.size:
            ids = np.concatenate((self.ends, ids))
            behind = np.concatenate((np.full(self.ends.shape, self.done), behind))
        order = np.lexsort((ids, behind))
        targets, starts = np.unique(behind[order], return_index=True)
        return TokenRow(self._shared(ids[order].astype(np.int32), starts), targets)

    def _shared(self, ids: NDArray[np.int32], starts: Ids) -> Shape:
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16)
        digest.update(starts.tobytes())
        key = digest.digest()
        if key not in self._shapes:
            self._shapes[key] = Shape(ids, starts, self.vocabulary.size, key)
            self._remembered += self._shapes[key].bytes
        return self._shapes[key]

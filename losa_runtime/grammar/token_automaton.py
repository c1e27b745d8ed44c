"""An automaton over tokens, made row by row when a state is first met: no table of states times vocabulary.

Behind the states of the bytes there is one more, `done`, entered by the tokens that end an output and never left: what
a block holds behind them is cut off. Knows no block and no probabilities.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from losa_runtime.grammar.automaton import ByteAutomaton
from losa_runtime.grammar.vocabulary import Vocabulary

Ids = NDArray[np.int64]
NOWHERE = -1
FAR = 2**31 - 1
REMEMBERED_BYTES = 128 << 20  # of rows, per automaton
WIDE = 4096  # tokens; rows of more have a mask and groups


class TokenRow(NamedTuple):
    """What may follow in a state. ids: tokens, grouped by the state behind them; the tokens that lead to targets[g] are
    ids[starts[g] : starts[g + 1]] (the last group: to the end). Of wide rows also mask_V: bool [V], the same ids,
    shared by states that allow the same; and group_V: int32 [V], the group of each id, -1 = not in the row."""

    ids: NDArray[np.int32]
    targets: Ids
    starts: Ids
    mask_V: NDArray[np.bool_] | None = None
    group_V: NDArray[np.int32] | None = None

    @property
    def group_of_id(self) -> Ids:
        """The group of each id in `ids`."""
        return np.repeat(np.arange(self.starts.size), np.diff(np.append(self.starts, self.ids.size)))

    @property
    def bytes(self) -> int:
        """What the row takes, about; its mask counts as if it were not shared."""
        return 256 + self.ids.nbytes + (0 if self.group_V is None else self.group_V.nbytes * 5 // 4)


class TokenAutomaton:
    """A byte automaton seen through a vocabulary. ends: ids that end an output where it may end."""

    def __init__(self, automaton: ByteAutomaton, vocabulary: Vocabulary, ends: frozenset[int]) -> None:
        self.automaton, self.vocabulary = automaton, vocabulary
        self.ends: Ids = np.array(sorted(ends), dtype=np.int64)
        self.done = automaton.states
        self._rows: OrderedDict[int, TokenRow] = OrderedDict()
        self._remembered = 0
        self._masks: dict[bytes, NDArray[np.bool_]] = {}
        self._left: dict[int, int] = {}

    def row(self, state: int) -> TokenRow:
        """All that may follow in a state."""
        found = self._rows.get(state)
        if found is None:
            found = self._make(state)
            self._rows[state] = found
            self._remembered += found.bytes
            while self._remembered > REMEMBERED_BYTES and len(self._rows) > 1:
                _, oldest = self._rows.popitem(last=False)
                self._remembered -= oldest.bytes
                self._masks.clear()  # rows keep theirs; what is shared is found anew
        self._rows.move_to_end(state)
        return found

    def step(self, state: int, token: int) -> int:
        """The state behind a token, or NOWHERE."""
        if state == self.done:
            return state
        if token in self.ends:
            return self.done if self.accepting(state) else NOWHERE
        return int(self.vocabulary.follow(self.automaton, np.array([state]), np.array([token]))[0, 0])

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
        behind = behind[order]
        targets, starts = np.unique(behind, return_index=True)
        row = TokenRow(ids[order].astype(np.int32), targets, starts)
        if ids.size <= WIDE:
            return row
        group_V = np.full(self.vocabulary.size, -1, dtype=np.int32)
        group_V[row.ids] = row.group_of_id
        mask_V = group_V >= 0
        key = hashlib.blake2b(np.packbits(mask_V).tobytes(), digest_size=16).digest()
        return row._replace(mask_V=self._masks.setdefault(key, mask_V), group_V=group_V)

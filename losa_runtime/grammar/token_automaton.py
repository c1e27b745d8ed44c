"""An automaton over tokens, made row by row when a state is first met: no table of states times vocabulary.

Beside the states of the bytes there is one more, DONE, entered by the tokens that end an output and never left: what a
block holds behind them is cut off. Knows no block and no probabilities.
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
DONE = -2
NOWHERE = -1
FAR = 2**31 - 1
REMEMBERED_TOKENS = 1 << 23  # of rows, per automaton: 128 MiB


class TokenRow(NamedTuple):
    """What may follow in a state. ids: tokens, grouped by the state behind them; the tokens that lead to targets[g] are
    ids[starts[g] : starts[g + 1]] (the last group: to the end). mask_V: bool [V], the same ids; states that allow the
    same ids share it."""

    ids: Ids
    targets: Ids
    starts: Ids
    mask_V: NDArray[np.bool_]


class TokenAutomaton:
    """A byte automaton seen through a vocabulary. ends: ids that end an output where it may end."""

    def __init__(self, automaton: ByteAutomaton, vocabulary: Vocabulary, ends: frozenset[int]) -> None:
        self.automaton, self.vocabulary = automaton, vocabulary
        self.ends: Ids = np.array(sorted(ends), dtype=np.int64)
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
            self._remembered += self._size(found)
            while self._remembered > REMEMBERED_TOKENS and len(self._rows) > 1:
                _, oldest = self._rows.popitem(last=False)
                self._remembered -= self._size(oldest)
                self._masks.clear()  # rows keep theirs; what is shared is found anew
        self._rows.move_to_end(state)
        return found

    def step(self, state: int, token: int) -> int:
        """The state behind a token, DONE or NOWHERE."""
        if state == DONE:
            return DONE
        if token in self.ends:
            return DONE if self.accepting(state) else NOWHERE
        return int(self.vocabulary.follow(self.automaton, np.array([state]), np.array([token]))[0, 0])

    def walk(self, tokens: Ids, state: int = 0) -> int:
        """The state behind some tokens, DONE or NOWHERE."""
        for token in tokens.tolist():
            if state == NOWHERE:
                break
            state = self.step(state, token)
        return state

    def accepting(self, state: int) -> bool:
        """Whether an output may end here."""
        return state == DONE or (state >= 0 and bool(self.automaton.accepting_S[state]))

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
            layer = [s for s in behind - seen if s >= 0]
            seen.update(layer)
        return best

    def _size(self, row: TokenRow) -> int:
        """In tokens of a list; a mask counts as if it were not shared."""
        return row.ids.size + row.mask_V.size // 16

    def _make(self, state: int) -> TokenRow:
        ids, behind = self.vocabulary.from_state(self.automaton, state)
        usable = ~np.isin(ids, self.ends)
        ids, behind = ids[usable], behind[usable]
        if self.accepting(state) and self.ends.size:
            ids = np.concatenate((self.ends, ids))
            behind = np.concatenate((np.full(self.ends.shape, DONE), behind))
        order = np.lexsort((ids, behind))
        ids, behind = ids[order], behind[order]
        targets, starts = np.unique(behind, return_index=True)
        mask_V = np.zeros(self.vocabulary.size, dtype=bool)
        mask_V[ids] = True
        key = hashlib.blake2b(np.packbits(mask_V).tobytes(), digest_size=16).digest()
        return TokenRow(ids, targets, starts, self._masks.setdefault(key, mask_V))

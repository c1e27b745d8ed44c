"""Which tokens can stand where in a block, so that the output still can match: forward and backward over positions.

A block is a row of positions; each holds a known token or a hole. A *path* is a state before each position and one
behind the last; it can be used if every known token is stepped on and its end can still finish within the tokens that
are left. The most probable path is found by dynamic programming over (position, state), the idea of DINGO
(arXiv 2505.23061); with temperature a path is drawn instead, with its exact probability among all usable ones: products
of the rows' own probabilities, as a masked model gives no others. m holes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from losa_runtime.grammar.token_automaton import DONE, NOWHERE, TokenAutomaton, TokenRow

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


class Block(NamedTuple):
    """tokens: of the positions that belong to the output, -1 = a hole. state: before the first. room: tokens that may
    still follow behind the last."""

    tokens: Ids
    state: int
    room: int


class Reach:
    """The states that usable paths pass: before each position, and behind the last."""

    def __init__(self, automaton: TokenAutomaton, block: Block) -> None:
        self.automaton, self.block = automaton, block
        self.before = _forward(automaton, block)
        self.edges = _backward(automaton, block, self.before)

    @property
    def possible(self) -> bool:
        """Whether any path can be used."""
        return not self.block.tokens.size or bool(self.edges[0])

    def allowed(self, position: int) -> NDArray[np.bool_]:
        """bool [V]: the ids that some usable path has at a hole. Behind the end of an output nothing is asked, and
        only the ends themselves are given."""
        found = np.zeros(self.automaton.vocabulary.size, dtype=bool)
        seen: set[int] = set()
        for state, targets in self.edges[position].items():
            if state == DONE:
                found[self.automaton.ends] = True
                continue
            row = self.automaton.row(state)
            if len(targets) < row.targets.size:
                for group in np.searchsorted(row.targets, targets):
                    found[row.ids[row.starts[group] : _stop(row, group)]] = True
            elif id(row.mask_V) not in seen:
                seen.add(id(row.mask_V))
                found |= row.mask_V
        return found


def _stop(row: TokenRow, group: int) -> int:
    return int(row.starts[group + 1]) if group + 1 < row.starts.size else row.ids.size


def _forward(automaton: TokenAutomaton, block: Block) -> list[set[int]]:
    before = [{block.state}]
    for token in block.tokens.tolist():
        behind: set[int] = set()
        for state in before[-1]:
            if token >= 0:
                behind.add(automaton.step(state, token))
            elif state == DONE:
                behind.add(DONE)
            else:
                behind.update(automaton.row(state).targets.tolist())
        before.append(behind - {NOWHERE})
    return before


def _backward(automaton: TokenAutomaton, block: Block, before: Sequence[set[int]]) -> list[dict[int, list[int]]]:
    """Per position and state before it: the states behind it on usable paths."""
    good = {state for state in before[-1] if automaton.can_finish(state, block.room)}
    edges: list[dict[int, list[int]]] = []
    for position in reversed(range(block.tokens.size)):
        token, here = int(block.tokens[position]), dict[int, list[int]]()
        for state in before[position]:
            if token >= 0:
                targets = {automaton.step(state, token)}
            elif state == DONE:
                targets = {DONE}
            else:
                targets = set(automaton.row(state).targets.tolist())
            if usable := sorted(targets & good):
                here[state] = usable
        edges.append(here)
        good = set(here)
    edges.reverse()
    return edges


def best_path(reach: Reach, logp: Mapping[int, Floats]) -> Ids:
    """The tokens of the most probable usable path. logp: per hole, the logarithm of each id's probability [V].

    Raises ValueError if there is none.
    """
    return _path(reach, logp, None)


def draw_path(reach: Reach, logp: Mapping[int, Floats], uniform: Mapping[int, float]) -> Ids:
    """The tokens of a usable path drawn with its probability. uniform: per hole, in [0, 1)."""
    return _path(reach, logp, uniform)


def _path(reach: Reach, logp: Mapping[int, Floats], uniform: Mapping[int, float] | None) -> Ids:
    """Values from the end: of the best path, or the sum over all; then from the start, the best step or a drawn one."""
    if not reach.possible:
        raise ValueError("no token sequence of this block can match")
    tokens, automaton = reach.block.tokens, reach.automaton
    value: list[dict[int, float]] = [dict.fromkeys(_ends(reach), 0.0)]
    for position in reversed(range(tokens.size)):
        behind, here = value[-1], dict[int, float]()
        for state, targets in reach.edges[position].items():
            if tokens[position] >= 0 or state == DONE:
                here[state] = behind[targets[0]]
                continue
            gains = _gains(automaton, state, targets, logp[position], uniform is not None)
            totals = gains + np.array([behind[target] for target in targets])
            here[state] = float(totals.max() if uniform is None else np.logaddexp.reduce(totals))
        value.append(here)
    value.reverse()
    return _trace(reach, logp, uniform, value)


def _ends(reach: Reach) -> set[int]:
    last = reach.edges[-1] if reach.edges else {}
    return {target for targets in last.values() for target in targets}


def _gains(automaton: TokenAutomaton, state: int, targets: Sequence[int], logp: Floats, total: bool) -> Floats:
    """Per target, the log-probability of the best token that leads there, or of all of them together."""
    row = automaton.row(state)
    of_ids = logp[row.ids]
    best = np.maximum.reduceat(of_ids, row.starts)
    if total:
        with np.errstate(invalid="ignore"):
            base = np.where(np.isfinite(best), best, 0.0)
        counts = np.diff(np.append(row.starts, row.ids.size))
        sums = np.add.reduceat(np.exp(of_ids - np.repeat(base, counts)), row.starts)
        with np.errstate(divide="ignore"):
            best = base + np.log(sums)
    return best[np.searchsorted(row.targets, targets)]


def _trace(
    reach: Reach, logp: Mapping[int, Floats], uniform: Mapping[int, float] | None, value: Sequence[Mapping[int, float]]
) -> Ids:
    """Follow the values from the first position on."""
    automaton, found, state = reach.automaton, reach.block.tokens.copy(), reach.block.state
    for position in range(found.size):
        targets = reach.edges[position][state]
        if found[position] >= 0:
            state = targets[0]
            continue
        if state == DONE:
            found[position] = automaton.ends[0]
            continue
        row = automaton.row(state)
        usable = np.isin(row.targets, targets)
        counts = np.diff(np.append(row.starts, row.ids.size))
        ahead = np.full(row.targets.size, -np.inf)
        ahead[usable] = [value[position + 1][int(target)] for target in row.targets[usable]]
        scores = logp[position][row.ids] + np.repeat(ahead, counts)
        pick = _pick(scores, None if uniform is None else uniform[position], np.repeat(usable, counts))
        found[position] = row.ids[pick]
        state = int(row.targets[np.searchsorted(row.starts, pick, side="right") - 1])
    return found


def _pick(scores: Floats, uniform: float | None, usable: NDArray[np.bool_]) -> int:
    """The best of the usable ones, or one drawn. Where the model gives all of them nothing, the first."""
    if not np.isfinite(scores[usable]).any():
        return int(np.flatnonzero(usable)[0])
    if uniform is None:
        return int(np.argmax(np.where(usable, scores, -np.inf)))
    weights = np.where(usable, np.exp(scores - scores[usable].max()), 0.0)
    cumulative = weights.cumsum()
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))

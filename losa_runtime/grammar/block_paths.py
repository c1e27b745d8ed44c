"""Which tokens can stand where in a block, so that the output still can match: forward and backward over positions.

A block is a row of positions; each holds a known token or a hole. A *path* is a state before each position and one
behind the last; it can be used if every known token is stepped on and its end can still finish within the tokens that
are left. The most probable path is found by dynamic programming over (position, state), the idea of DINGO
(arXiv 2505.23061); with temperature a path is drawn instead, with its exact probability among all usable ones: products
of the rows' own probabilities, as a masked model gives no others.

Where a row is wide (in free text), only the LIKELIEST tokens of the hole are looked at, unless none of them leads on:
what is left out is hardly ever part of the best path, and what is found is usable anyway.
S states with `done`, V vocabulary, m states before a position.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from losa_runtime.grammar.token_automaton import NOWHERE, TokenAutomaton, TokenRow

LIKELIEST = 1024

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Block(NamedTuple):
    """tokens: of the positions that belong to the output, -1 = a hole. state: before the first. room: tokens that may
    still follow behind the last."""

    tokens: Ids
    state: int
    room: int


class _Layer:
    """The rows of the states before a hole, one behind the other, so that all of them are gone through at once."""

    def __init__(self, automaton: TokenAutomaton, states: Ids) -> None:
        self.states = states
        self.rows = [automaton.row(int(state)) for state in states]
        groups = np.array([row.targets.size for row in self.rows])
        self.first = np.concatenate(([0], np.cumsum(groups)[:-1])).astype(np.int64)  # group of each state
        self.targets: Ids = np.concatenate([row.targets for row in self.rows])

    @cached_property
    def narrow(self) -> tuple[NDArray[np.int32], Ids, Ids]:
        """Of the rows that are not wide: all ids, the first id of each group, and the number of each group."""
        mine = [n for n, row in enumerate(self.rows) if row.group_V is None]
        if not mine:
            nothing = np.empty(0, dtype=np.int64)
            return nothing.astype(np.int32), nothing, nothing
        sizes = np.array([self.rows[n].ids.size for n in mine])
        shifts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        starts = np.concatenate([self.rows[n].starts + shift for n, shift in zip(mine, shifts, strict=True)])
        numbers = np.concatenate([self.first[n] + np.arange(self.rows[n].targets.size) for n in mine])
        return np.concatenate([self.rows[n].ids for n in mine]), starts, numbers

    def any_of(self, good_S: Flags) -> Flags:
        """bool [m]: the states that lead to a good one."""
        return np.logical_or.reduceat(good_S[self.targets], self.first)


class Reach:
    """The states that usable paths pass: good[i], bool [S], before position i, and behind the last one."""

    def __init__(self, automaton: TokenAutomaton, block: Block) -> None:
        self.automaton, self.block = automaton, block
        self._layers: list[_Layer | None] = []
        self._before = self._forward()
        self.good = self._backward()

    @property
    def possible(self) -> bool:
        """Whether any path can be used."""
        return bool(self.good[0].any())

    def layer(self, position: int) -> _Layer | None:
        """The rows of the states before a hole; None behind a certain end."""
        return self._layers[position]

    def allowed(self, position: int) -> Flags:
        """bool [V]: the ids that some usable path has at a hole. Behind the end of an output nothing is asked, and
        only the ends themselves are given."""
        found = np.zeros(self.automaton.vocabulary.size, dtype=bool)
        here, behind = self.good[position], self.good[position + 1]
        if here[self.automaton.done]:
            found[self.automaton.ends] = True
        layer, seen = self._layers[position], set[int]()
        for state, row in zip(layer.states, layer.rows, strict=True) if layer else ():
            if not here[state]:
                continue
            usable = behind[row.targets]
            if not usable.all():
                found[row.ids[usable[row.group_of_id]]] = True
            elif row.mask_V is None:
                found[row.ids] = True
            elif id(row.mask_V) not in seen:
                seen.add(id(row.mask_V))
                found |= row.mask_V
        return found

    def only_done(self, position: int) -> bool:
        """Whether all usable paths have ended before a position."""
        return bool(self.good[position][self.automaton.done]) and int(self.good[position].sum()) == 1

    def _forward(self) -> list[Ids]:
        """The states before each position and behind the last, ascending."""
        automaton, before = self.automaton, [np.array([self.block.state])]
        for token in self.block.tokens.tolist():
            states = before[-1]
            inner = states[states != automaton.done]
            if token >= 0:
                self._layers.append(None)
                behind = np.array([automaton.step(int(state), token) for state in states], dtype=np.int64)
            else:
                layer = _Layer(automaton, inner) if inner.size else None
                self._layers.append(layer)
                ended = states[states == automaton.done]
                behind = ended if layer is None else np.concatenate((layer.targets, ended))
            before.append(np.unique(behind[behind != NOWHERE]))
        return before

    def _backward(self) -> list[Flags]:
        automaton = self.automaton
        good = [np.zeros(automaton.done + 1, dtype=bool)]
        for state in self._before[-1].tolist():
            good[0][state] = automaton.can_finish(state, self.block.room)
        for position in reversed(range(self.block.tokens.size)):
            token, behind, here = int(self.block.tokens[position]), good[-1], np.zeros_like(good[0])
            states, layer = self._before[position], self._layers[position]
            if token >= 0:
                targets = np.array([automaton.step(int(state), token) for state in states], dtype=np.int64)
                here[states] = (targets != NOWHERE) & behind[targets]
            else:
                here[states[states == automaton.done]] = behind[automaton.done]
                if layer is not None:
                    here[layer.states] = layer.any_of(behind)
            good.append(here)
        good.reverse()
        return good


def best_path(reach: Reach, logp: Mapping[int, Floats]) -> Ids:
    """The tokens of the most probable usable path. logp: per hole, the logarithm of each id's probability [V].

    Raises ValueError if there is none.
    """
    return _Values(reach, logp, total=False).path(None)


def draw_path(reach: Reach, logp: Mapping[int, Floats], uniform: Mapping[int, float]) -> Ids:
    """The tokens of a usable path drawn with its probability. uniform: per hole, in [0, 1)."""
    return _Values(reach, logp, total=True).path(uniform)


class _Values:
    """From the end to the start: of every state before every position, what the best path from there is worth, or
    (total) all paths together. Then from the start to the end, the best step or a drawn one."""

    def __init__(self, reach: Reach, logp: Mapping[int, Floats], total: bool) -> None:
        if not reach.possible:
            raise ValueError("no token sequence of this block can match")
        self._reach, self._automaton, self._logp, self._total = reach, reach.automaton, logp, total
        self._likeliest = _Likeliest(logp)
        value = [np.where(reach.good[-1], 0.0, -np.inf)]
        for position in reversed(range(reach.block.tokens.size)):
            value.append(np.where(reach.good[position], self._before(position, value[-1]), -np.inf))
        value.reverse()
        self._value = value

    def _before(self, position: int, behind_S: Floats) -> Floats:
        """[S]: the values before a position, of those behind it."""
        reach, token = self._reach, int(self._reach.block.tokens[position])
        here = np.full_like(behind_S, -np.inf)
        here[-1] = behind_S[-1]
        if token >= 0:
            for state in np.flatnonzero(reach.good[position]).tolist():
                here[state] = behind_S[self._automaton.step(state, token)]
        elif (layer := reach.layer(position)) is not None:
            gains = self._gains(layer, position, behind_S) + behind_S[layer.targets]
            gather = np.logaddexp.reduceat if self._total else np.maximum.reduceat
            here[layer.states] = gather(gains, layer.first)
        return here

    def _gains(self, layer: _Layer, position: int, behind_S: Floats) -> Floats:
        """Per group of a layer, the log-probability of its best token, or of all of them together."""
        logp, found = self._logp[position], np.full(layer.targets.size, -np.inf)
        ids, starts, numbers = layer.narrow
        if numbers.size:
            found[numbers] = _of_groups(logp[ids], starts, self._total)
        for row, first in zip(layer.rows, layer.first, strict=True):
            if row.group_V is not None:
                some, groups = self._considered(row, position, np.isfinite(behind_S[row.targets]))
                order = np.argsort(groups, kind="stable")
                present, starts = np.unique(groups[order], return_index=True)
                found[first + present] = _of_groups(logp[some[order]], starts, self._total)
        return found

    def _considered(self, row: TokenRow, position: int, usable: Flags) -> tuple[Ids, Ids]:
        """The tokens of a row that are looked at, and their groups. usable: the groups that lead on."""
        if row.group_V is not None:
            likeliest = self._likeliest[position]
            groups = row.group_V[likeliest]
            here = groups >= 0
            found = groups[here].astype(np.int64)
            if usable[found].any():
                return likeliest[here], found
        return row.ids.astype(np.int64), row.group_of_id

    def path(self, uniform: Mapping[int, float] | None) -> Ids:
        """The tokens of all positions."""
        found, state = self._reach.block.tokens.copy(), self._reach.block.state
        for position in range(found.size):
            if found[position] >= 0:
                state = self._automaton.step(state, int(found[position]))
            elif state == self._automaton.done:
                found[position] = self._automaton.ends[0]
            else:
                row = self._automaton.row(state)
                usable = self._reach.good[position + 1][row.targets]
                ids, groups = self._considered(row, position, usable)
                scores = self._logp[position][ids] + self._value[position + 1][row.targets][groups]
                pick = _pick(scores, None if uniform is None else uniform[position], usable[groups])
                found[position] = ids[pick]
                state = int(row.targets[groups[pick]])
        return found


class _Likeliest(dict[int, Ids]):
    """Per hole the LIKELIEST ids with the greatest probability, ascending; found when first asked for."""

    def __init__(self, logp: Mapping[int, Floats]) -> None:
        super().__init__()
        self._logp = logp

    def __missing__(self, hole: int) -> Ids:
        logp = self._logp[hole]
        if logp.size <= LIKELIEST:
            found = np.arange(logp.size)
        else:
            found = np.sort(np.argpartition(logp, logp.size - LIKELIEST)[logp.size - LIKELIEST :])
        self[hole] = found
        return found


def _of_groups(logp: Floats, starts: Ids, total: bool) -> Floats:
    """Per group of neighbours, the best value or the logarithm of the sum of all."""
    return np.logaddexp.reduceat(logp, starts) if total else np.maximum.reduceat(logp, starts)


def _pick(scores: Floats, uniform: float | None, usable: Flags) -> int:
    """The best of the usable ones, or one drawn. Where the model gives all of them nothing, the first."""
    if not np.isfinite(scores[usable]).any():
        return int(np.flatnonzero(usable)[0])
    if uniform is None:
        return int(np.argmax(np.where(usable, scores, -np.inf)))
    weights = np.where(usable, np.exp(scores - scores[usable].max()), 0.0)
    cumulative = weights.cumsum()
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))

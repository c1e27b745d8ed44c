"""Which tokens can stand where in a block, so that the output still can match: forward and backward over positions.

A block is a row of positions; each holds a known token or a hole. A *path* is a state before each position and one
behind the last; it can be used if every known token is stepped on and its end can still finish within the tokens that
are left. The most probable path is found by dynamic programming over (position, state), the idea of DINGO
(arXiv 2505.23061); with temperature a path is drawn instead, with its exact probability among all usable ones: products
of the rows' own probabilities, as a masked model gives no others.

Where a state allows very many tokens (in free text), only the LIKELIEST of the hole are looked at, unless none of them
leads on: what is left out is hardly ever part of the best path, and what is found is usable anyway.
S states with `done`, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from losa_runtime.grammar.token_automaton import NOWHERE, Layer, Shape, ShapeRoom, TokenAutomaton

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


class Reach:
    """The states that usable paths pass: good[i], bool [S], before position i, and behind the last one.

    Raises ValueError where the block needs more of the automaton's rows than may be remembered at once.
    """

    def __init__(self, automaton: TokenAutomaton, block: Block) -> None:
        self.automaton, self.block = automaton, block
        self.layers: list[Layer | None] = []  # the rows of the states before a hole; None where there are none
        self._before = self._forward()
        self.good = self._backward()

    @property
    def possible(self) -> bool:
        """Whether any path can be used."""
        return bool(self.good[0].any())

    def allowed(self, position: int) -> Flags:
        """bool [V]: the ids that some usable path has at a hole. Behind the end of an output nothing is asked, and
        only the ends themselves are given."""
        found = np.zeros(self.automaton.vocabulary.size, dtype=bool)
        here, layer = self.good[position], self.layers[position]
        if here[self.automaton.done]:
            found[self.automaton.ends] = True
        if layer is not None:
            used = layer.used(here, self.good[position + 1])
            ids, starts, numbers = layer.narrow
            found[ids[np.repeat(used[numbers], np.diff(np.append(starts, ids.size)))]] = True
            for shape, groups in layer.wide:
                if used[groups].all():
                    found |= shape.group_V >= 0
                elif used[groups].any():
                    found[shape.ids[used[groups][shape.group_of_id]]] = True
        return found

    def only_done(self, position: int) -> bool:
        """Whether all usable paths have ended before a position."""
        return bool(self.good[position][self.automaton.done]) and int(self.good[position].sum()) == 1

    def _forward(self) -> list[Ids]:
        """The states before each position and behind the last, ascending."""
        automaton, before = self.automaton, [np.array([self.block.state])]
        room = ShapeRoom(automaton.limit)
        for token in self.block.tokens.tolist():
            states = before[-1]
            if token >= 0:
                self.layers.append(None)
                behind = np.unique(automaton.steps(states, token))
                before.append(behind[behind != NOWHERE])
                continue
            inner = states[states != automaton.done]
            layer = automaton.layer(inner) if inner.size else None
            self.layers.append(layer)
            for shape, _ in () if layer is None else layer.shapes.values():
                room.take(shape)
            behind = inner if layer is None else layer.behind
            ended = inner.size < states.size and not (behind.size and behind[-1] == automaton.done)
            before.append(np.append(behind, automaton.done) if ended else behind)
        return before

    def _backward(self) -> list[Flags]:
        automaton = self.automaton
        good = [np.zeros(automaton.done + 1, dtype=bool)]
        for state in self._before[-1].tolist():
            good[0][state] = automaton.can_finish(state, self.block.room)
        for position in reversed(range(self.block.tokens.size)):
            token, behind, here = int(self.block.tokens[position]), good[-1], np.zeros_like(good[0])
            states, layer = self._before[position], self.layers[position]
            if token >= 0:
                targets = automaton.steps(states, token)
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
        here, layer = np.full_like(behind_S, -np.inf), reach.layers[position]
        here[-1] = behind_S[-1]
        if token >= 0:
            states = np.flatnonzero(reach.good[position])
            here[states] = behind_S[self._automaton.steps(states, token)]
        elif layer is not None:
            here[layer.states] = self._through(layer, position, behind_S, exact=False)
            if layer.wide and not np.isfinite(here[reach.good[position]]).all():
                here[layer.states] = self._through(layer, position, behind_S, exact=True)
        return here

    def _through(self, layer: Layer, position: int, behind_S: Floats, exact: bool) -> Floats:
        """Per state of a layer, the best of its groups, or all of them together. exact: look at every token."""
        logp, gains_g = self._logp[position], np.full(layer.groups, -np.inf)
        ids, starts, numbers = layer.narrow
        if numbers.size:
            gains_g[numbers] = self._gather(logp[ids], starts)
        for shape, groups in layer.wide:
            if exact:
                gains_g[groups] = self._gather(logp[shape.ids], shape.starts)
                continue
            some, of = self._looked_at(shape, position)
            order = np.argsort(of, kind="stable")
            present, starts = np.unique(of[order], return_index=True)
            if present.size:
                gains_g[groups][present] = self._gather(logp[some[order]], starts)
        return self._gather(gains_g[layer.group_e] + behind_S[layer.targets_e], layer.first_m)

    def _gather(self, values: Floats, starts: Ids) -> Floats:
        """Per group of neighbours, the best, or the logarithm of the sum of all."""
        found: Floats = (np.logaddexp if self._total else np.maximum).reduceat(values, starts)
        return found

    def _looked_at(self, shape: Shape, position: int) -> tuple[Ids, Ids]:
        """Those of the likeliest tokens that are in a wide shape, and their groups."""
        groups = shape.group_V[self._likeliest[position]]
        return self._likeliest[position][groups >= 0], groups[groups >= 0].astype(np.int64)

    def path(self, uniform: Mapping[int, float] | None) -> Ids:
        """The tokens of all positions."""
        found, state = self._reach.block.tokens.copy(), self._reach.block.state
        for position in range(found.size):
            if found[position] >= 0:
                state = self._automaton.step(state, int(found[position]))
            elif state == self._automaton.done:
                found[position] = self._automaton.ends[0]
            else:
                shape, targets = self._automaton.row(state)
                usable = self._reach.good[position + 1][targets]
                ids, groups = self._looked_at(shape, position) if shape.wide else (shape.ids, shape.group_of_id)
                if not usable[groups].any():
                    ids, groups = shape.ids, shape.group_of_id
                scores = self._logp[position][ids] + self._value[position + 1][targets][groups]
                pick = _pick(scores, None if uniform is None else uniform[position], usable[groups])
                found[position] = ids[pick]
                state = int(targets[groups[pick]])
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


def _pick(scores: Floats, uniform: float | None, usable: Flags) -> int:
    """The best of the usable ones, or one drawn. Where the model gives all of them nothing, the first."""
    if not np.isfinite(scores[usable]).any():
        return int(np.flatnonzero(usable)[0])
    if uniform is None:
        return int(np.argmax(np.where(usable, scores, -np.inf)))
    weights = np.where(usable, np.exp(scores - scores[usable].max()), 0.0)
    cumulative = weights.cumsum()
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))

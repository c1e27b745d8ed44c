"""Grammars over tokens, and tokens for blocks that have to match them: all blocks of a step in one call.

The reference is `losa_runtime.grammar` (block_paths, token_automaton) with `losa_runtime.runner.guided`; it works on
the same arrays. V vocabulary, S states, n holes of all blocks.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from losa_kernels.native.library import CAutomaton, CGuided, Kernels

Ids = NDArray[np.int64]
FAR = 2**31 - 1


class Words:
    """The bytes of every id of a vocabulary, empty for what is no text."""

    def __init__(self, kernels: Kernels, pieces: Sequence[bytes]) -> None:
        self.kernels, self.size = kernels, len(pieces)
        starts = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        self.handle = c_void_p()
        kernels.call("losa_words_new", self.size, starts.ctypes.data, b"".join(pieces), byref(self.handle))
        weakref.finalize(self, kernels.free, "losa_words_free", self.handle)


class Automaton(NamedTuple):
    """A deterministic automaton over bytes: next int32 [S, C], -1 = no match goes on like this; class_of uint8 [256];
    accepting bool [S]; bytes_left int32 [S], the fewest bytes to an accepting state."""

    next: NDArray[np.int32]
    class_of: NDArray[np.uint8]
    accepting: NDArray[np.bool_]
    bytes_left: NDArray[np.int32]


class Limits(NamedTuple):
    """wide: states with more ids than this are judged by the `likeliest` ids of a hole. work: of one search for the
    fewest tokens left, in ids looked at. bytes: of rows, beyond which all are made anew."""

    wide: int
    likeliest: int
    work: int
    bytes: int


class Grammar:
    """An automaton seen through a vocabulary. ends: ids that end an output where it may end. Raises ValueError."""

    def __init__(self, words: Words, automaton: Automaton, ends: Sequence[int], limits: Limits) -> None:
        self.kernels, self.size, self.done = words.kernels, words.size, int(automaton.next.shape[0])
        columns: tuple[NDArray[Any], ...] = (
            np.ascontiguousarray(automaton.next, dtype=np.int32),
            np.ascontiguousarray(automaton.class_of, dtype=np.uint8),
            np.ascontiguousarray(automaton.accepting, dtype=np.uint8),
            np.ascontiguousarray(automaton.bytes_left, dtype=np.int32),
        )
        for name, found, wanted in zip(automaton._fields[1:], columns[1:], (256, self.done, self.done), strict=True):
            if found.shape != (wanted,):
                raise ValueError(f"{name}: found {list(found.shape)}, allowed: [{wanted}]")
        table = CAutomaton(*automaton.next.shape, *(column.ctypes.data for column in columns))
        sorted_ends = np.array(sorted(ends), dtype=np.int32)
        about = (sorted_ends.ctypes.data, sorted_ends.size, *limits)
        self.handle = c_void_p()
        self.kernels.call("losa_grammar_new", words.handle, byref(table), *about, byref(self.handle))
        weakref.finalize(self, self.kernels.free, "losa_grammar_free", self.handle)

    @property
    def bytes(self) -> int:
        """What it holds, about."""
        return self.kernels.ask("losa_grammar_bytes", self.handle)

    def walk(self, tokens: Ids, state: int = 0) -> int:
        """The state behind some tokens, -1 where they cannot follow."""
        found = c_int64(state)
        known = np.ascontiguousarray(tokens, dtype=np.int64)
        self.kernels.call("losa_grammar_walk", self.handle, known.ctypes.data, known.size, byref(found))
        return found.value

    def tokens_left(self, state: int) -> int:
        """The fewest tokens from a state to where an output may end; FAR if none do. Where the search takes too long,
        as many as single bytes would take."""
        return self._left(state, -1)

    def can_finish(self, state: int, room: int) -> bool:
        """Whether at most `room` further tokens lead to where an output may end."""
        return self._left(state, room) <= room

    def _left(self, state: int, room: int) -> int:
        left = c_int64()
        self.kernels.call("losa_grammar_left", self.handle, state, room, byref(left))
        return left.value


class Blocks(NamedTuple):
    """Blocks of a step. tokens: of each block's output positions, -1 = a hole; states before the first, rooms: tokens
    that may follow behind the last. path: along the best path, otherwise each hole by itself; drawn: by `uniform`.

    Of every hole, in order: logits float32 [n, >= V]; kept, bool of that shape, or None where nothing is filtered out;
    sharpness, float64 [n], one by the temperature; total, the logarithm of the sum of e^(sharpness * logit); uniform.
    """

    grammars: Sequence[Grammar]
    tokens: Sequence[Ids]
    states: Sequence[int]
    rooms: Sequence[int]
    path: Sequence[bool]
    drawn: Sequence[bool]
    logits: NDArray[np.float32]
    kept: NDArray[np.bool_] | None
    sharpness: NDArray[np.float64]
    total: NDArray[np.float64]
    uniform: NDArray[np.float64]


class Chosen(NamedTuple):
    """Per hole: tokens int64, confidence and logprob float64."""

    tokens: Ids
    confidence: NDArray[np.float64]
    logprob: NDArray[np.float64]


class BlockChoices:
    """Tokens for the holes of some blocks, and what becomes of them when some are accepted. Raises ValueError."""

    def __init__(self, kernels: Kernels, blocks: Blocks) -> None:
        self._kernels = kernels
        count, holes = len(blocks.grammars), len(blocks.logits)
        handles = (c_void_p * count)(*(grammar.handle for grammar in blocks.grammars))
        self._kept_alive = [handles, blocks]
        rows = (blocks.sharpness, blocks.total, blocks.uniform)
        for name, column in zip(("sharpness", "total", "uniform"), rows, strict=True):
            if column.shape != (holes,):
                raise ValueError(f"{name}: found {list(column.shape)}, allowed: [{holes}]")
        if blocks.kept is not None and blocks.kept.shape != blocks.logits.shape:
            raise ValueError(f"kept: found {list(blocks.kept.shape)}, allowed: {list(blocks.logits.shape)}")
        self._blocks = CGuided(
            count,
            ctypes.cast(handles, c_void_p),
            self._at(np.cumsum([0, *(tokens.size for tokens in blocks.tokens)]), np.int64),
            self._at(np.concatenate(blocks.tokens), np.int64),
            *(self._at(np.array(column), np.int64) for column in (blocks.states, blocks.rooms)),
            *(self._at(np.array(column), np.uint8) for column in (blocks.path, blocks.drawn)),
            holes,
            blocks.logits.shape[1],
            self._at(blocks.logits, np.float32),
            None if blocks.kept is None else self._at(blocks.kept, np.uint8),
            *(self._at(column, np.float64) for column in rows),
        )
        self.chosen = Chosen(np.empty(holes, dtype=np.int64), np.empty(holes), np.empty(holes))
        kernels.call("losa_guide", byref(self._blocks), *(column.ctypes.data for column in self.chosen))

    def settle(self, accepted: NDArray[np.bool_]) -> Chosen:
        """What was chosen, with accepted tokens [n] that fit together."""
        found = Chosen(self.chosen.tokens.copy(), self.chosen.confidence, self.chosen.logprob.copy())
        if accepted.shape != found.tokens.shape:
            raise ValueError(f"accepted: found {list(accepted.shape)}, allowed: {list(found.tokens.shape)}")
        yes = np.ascontiguousarray(accepted, dtype=np.uint8)
        places = (found.confidence, found.tokens, found.logprob)
        self._kernels.call(
            "losa_settle", byref(self._blocks), yes.ctypes.data, *(column.ctypes.data for column in places)
        )
        return found

    def _at(self, column: NDArray[Any], dtype: type[np.generic]) -> int:
        whole = np.ascontiguousarray(column, dtype=dtype)
        self._kept_alive.append(whole)
        return whole.ctypes.data

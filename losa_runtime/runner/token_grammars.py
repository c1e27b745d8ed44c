"""Automata over the model's tokens: the C++ kernels' where they can be used, else those of numpy. Knows no request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from losa_kernels.native.guided import Automaton, Grammar, Limits, Words
from losa_kernels.native.library import Kernels, NativeUnavailable
from losa_runtime.grammar.automaton import ByteAutomaton
from losa_runtime.grammar.block_paths import LIKELIEST
from losa_runtime.grammar.guide import OverTokens
from losa_runtime.grammar.token_automaton import REMEMBERED_BYTES, WIDE, TokenAutomaton
from losa_runtime.grammar.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

SEARCH_WORK = 1 << 26  # ids looked at in one search for the shortest output: some tenths of a second
LIMITS = Limits(WIDE, LIKELIEST, SEARCH_WORK, REMEMBERED_BYTES)


class TokenGrammars:
    """Makes them. pieces: gives the bytes of every token id, empty for what is no text (special tokens, MASK)."""

    def __init__(self, pieces: Callable[[], Sequence[bytes]], native: bool = True) -> None:
        self._pieces, self._native = pieces, native
        self._words: Words | Vocabulary | None = None

    def __call__(self, automaton: ByteAutomaton, ends: frozenset[int]) -> OverTokens:
        """A byte automaton seen through the vocabulary; `ends` are the ids that end an output where it may end."""
        if self._words is None:
            self._words = self._vocabulary()
        if isinstance(self._words, Vocabulary):
            return TokenAutomaton(automaton, self._words, ends, LIMITS.bytes)
        table = Automaton(automaton.next_SC, automaton.class_B, automaton.accepting_S, automaton.bytes_left_S)
        return Grammar(self._words, table, sorted(ends), LIMITS)

    def _vocabulary(self) -> Words | Vocabulary:
        pieces = self._pieces()
        if self._native:
            try:
                return Words(Kernels(), pieces)
            except NativeUnavailable as reason:
                logger.warning("grammars are followed by numpy, which is slow: %s", reason)
        return Vocabulary(pieces)

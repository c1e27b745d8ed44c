"""A vocabulary small enough to try everything: all token sequences, against Python's own regular expressions."""

from __future__ import annotations

import re
from functools import cache
from itertools import product

import numpy as np

from losa_runtime.grammar.automaton import ByteAutomaton
from losa_runtime.grammar.compile_worker import compile_pattern
from losa_runtime.grammar.token_automaton import TokenAutomaton
from losa_runtime.grammar.vocabulary import Vocabulary

# Two bytes of one character apart, a token with both, longer ones, and ids that are no text (MASK, END).
PIECES = (b"a", b"b", b"ab", b"", b"\xc3", b"\xa9", "é".encode(), b"bb\xc3", b"")
MASK, END = 3, 8
TEXT = tuple(i for i, piece in enumerate(PIECES) if piece)


@cache
def compiled(pattern: str) -> ByteAutomaton:
    return compile_pattern(pattern)


def automaton(pattern: str, ends: frozenset[int] = frozenset({END})) -> TokenAutomaton:
    return TokenAutomaton(compiled(pattern), Vocabulary(PIECES), ends)


def text_of(tokens: tuple[int, ...] | list[int]) -> bytes:
    """The bytes before the first END."""
    tokens = list(tokens)
    return b"".join(PIECES[t] for t in (tokens[: tokens.index(END)] if END in tokens else tokens))


def matches(pattern: str, text: bytes) -> bool:
    try:
        return re.fullmatch(pattern, text.decode()) is not None
    except UnicodeDecodeError:
        return False


def can_finish(pattern: str, text: bytes, room: int) -> bool:
    """Whether some `room` tokens or fewer make it a match."""
    return any(
        matches(pattern, text + b"".join(PIECES[t] for t in more))
        for count in range(room + 1)
        for more in product(TEXT, repeat=count)
    )


def usable(pattern: str, known: list[int], room: int) -> list[tuple[int, ...]]:
    """All fillings of the holes (-1) that still can match. Behind END a hole is END."""
    choices = [(*TEXT, END) if token < 0 else (token,) for token in known]
    found = []
    for tokens in product(*choices):
        done = tokens.index(END) if END in tokens else len(tokens)
        if any(known[i] < 0 and tokens[i] != END for i in range(done + 1, len(tokens))):
            continue
        text = text_of(tokens)
        if matches(pattern, text) if done < len(tokens) else can_finish(pattern, text, room):
            found.append(tokens)
    return found


def logp(rng: np.random.Generator, holes: list[int]) -> dict[int, np.ndarray]:
    """Random probabilities for each hole, of every id."""
    found = {}
    for hole in holes:
        values = rng.normal(size=len(PIECES)) * 2
        found[hole] = values - np.log(np.exp(values).sum())
    return found

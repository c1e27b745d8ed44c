"""What a grammar costs over a large vocabulary: compiling, the first blocks, later blocks, memory.

The vocabulary is made up: all bytes, and words of letters, digits and signs with and without a space before them.
Knows no engine and no table.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from losa_kernels.native.guided import BlockChoices, Blocks, Grammar
from losa_kernels.native.library import Kernels
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.grammar.compiler import Compiler
from losa_runtime.grammar.guide import Guides, OutputGuide, compile_constraint
from losa_runtime.runner.token_grammars import TokenGrammars

PATTERNS = {
    "digits": "[0-9]{4}",
    "JSON": r'\{"name": "[^"\\]{1,40}", "age": [0-9]{1,3}\}',
    "free text": r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*"',
}
BLOCK, ROOM = 16, 256


def large(size: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Per pattern: milliseconds to compile it (the worker runs already), to see it through the vocabulary, and for a
    block of 16 masks in both modes, each for the first time and later; CPU time, but for compiling. And bytes."""
    pieces = made_up_vocabulary(size, random.Random(0))
    end = size - 1
    generator = np.random.default_rng(0)
    logits = np.log(generator.dirichlet(np.full(size, 0.01), size=BLOCK) + 1e-30).astype(np.float32)
    compiler = Compiler()
    guides = Guides(TokenGrammars(lambda: pieces), compiler)
    guides.make(SamplingParams(regex="warm"), frozenset({end}), ROOM)
    found: dict[str, Any] = {}
    for name, pattern in PATTERNS.items():
        params = SamplingParams(regex=pattern)
        compiled, compile_ms = _timed(lambda: compile_constraint(params, compiler), 3, time.perf_counter)  # noqa: B023
        guide, guide_ms = _timed(lambda: guides.make(params, frozenset({end}), ROOM, compiled), 3)  # noqa: B023
        assert guide is not None and isinstance(guide.automaton, Grammar) and compiled is not None
        row: dict[str, Any] = {"states": guide.automaton.done, "compile_ms": compile_ms, "guide_ms": guide_ms}
        row |= {f"{mode}_ms": _blocks(guide, logits, mode) for mode in ("map", "valid")}
        found[name] = row | {"compiled_bytes": len(compiled), "bytes": guide.automaton.bytes}
        tick()
    compiler.close()
    return found | {"vocabulary_bytes": sum(map(len, pieces))}


def made_up_vocabulary(size: int, rng: random.Random) -> list[bytes]:
    """`size` tokens, the last of them without text."""
    pieces = {bytes((byte,)): None for byte in range(256)}
    letters = 'etaoinshrdlucmfwypvbgkjqxz0123456789"{}:,.'
    while len(pieces) < size - 1:
        word = "".join(rng.choice(letters) for _ in range(rng.randint(2, 8)))
        pieces[(rng.choice(("", " ")) + word).encode()] = None
    return [*pieces, b""]


def _blocks(guide: OutputGuide, logits: np.ndarray, mode: str) -> dict[str, float]:
    assert isinstance(guide.automaton, Grammar)
    masks, even = np.full(BLOCK, -1), np.ones(BLOCK)
    blocks = Blocks(
        [guide.automaton], [masks], [0], [ROOM], [mode == "map"], [False], logits, None, even, 0 * even, 0 * even
    )
    kernels = Kernels()
    return _timed(lambda: BlockChoices(kernels, blocks), 6)[1]


def _timed(work: Callable[[], Any], times: int, clock: Callable[[], float] = time.process_time) -> tuple[Any, Any]:
    """What the last run gave, and the milliseconds of the first and the median of all others."""
    seconds = []
    for _ in range(times):
        began = clock()
        made = work()
        seconds.append(clock() - began)
    later = statistics.median(seconds[1:])
    return made, {"first": round(seconds[0] * 1e3, 1), "later": round(later * 1e3, 2)}

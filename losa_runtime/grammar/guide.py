"""The grammar of one request's output, and where those of all requests come from.

What a request asks for (`regex` or `json_schema`) becomes a pattern, the pattern an automaton over bytes, that one an
automaton over the model's tokens, which all requests with the same pattern and the same ends share. Knows no tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.grammar.automaton import ByteAutomaton
from losa_runtime.grammar.block_paths import Block
from losa_runtime.grammar.compiler import Compiler
from losa_runtime.grammar.json_schema import UnsupportedSchema, schema_pattern
from losa_runtime.grammar.token_automaton import FAR, NOWHERE

SHARED, SHARED_BYTES = 64, 512 << 20  # of token automata that are remembered; REMEMBERED_BYTES bounds the rows of each


class OverTokens(Protocol):
    """A byte automaton seen through a vocabulary: `TokenAutomaton`, or the C++ kernels' `Grammar`."""

    @property
    def bytes(self) -> int:
        """What it holds, about."""

    def walk(self, tokens: NDArray[np.int64], state: int = 0) -> int:
        """The state behind some tokens, or NOWHERE."""

    def tokens_left(self, state: int) -> int:
        """The fewest tokens from a state to where an output may end; FAR if none do."""

    def can_finish(self, state: int, room: int) -> bool:
        """Whether at most `room` further tokens lead to where an output may end."""


class OutputGuide:
    """What the output of one request must match. limit: its max_new_tokens. Remembers how far it has read."""

    def __init__(self, automaton: OverTokens, limit: int) -> None:
        self.automaton, self.limit = automaton, limit
        self._read, self._state = 0, 0

    def block(self, output: NDArray[np.int32], tokens: NDArray[np.int64]) -> Block:
        """A block behind finished output. tokens: those of its output positions, -1 = a hole."""
        return Block(tokens, self._behind(output), max(0, self.limit - int(output.size) - int(tokens.size)))

    def _behind(self, output: NDArray[np.int32]) -> int:
        if output.size < self._read:  # the request was taken back further than to its last block
            self._read, self._state = 0, 0
        self._state = self.automaton.walk(output[self._read :].astype(np.int64), self._state)
        self._read = int(output.size)
        assert self._state != NOWHERE, "an output that left its grammar"
        return self._state


class Guides:
    """Makes guides. over_tokens: sees a byte automaton, and ids that end an output, through the model's vocabulary."""

    def __init__(
        self, over_tokens: Callable[[ByteAutomaton, frozenset[int]], OverTokens], compiler: Compiler | None = None
    ) -> None:
        self._over_tokens, self._compiler = over_tokens, compiler or Compiler()
        self._shared: OrderedDict[tuple[bytes, frozenset[int]], OverTokens] = OrderedDict()

    def make(
        self, params: SamplingParams, ends: frozenset[int], limit: int, compiled: bytes | None = None
    ) -> OutputGuide | None:
        """The guide of a request, None if it asks for no grammar.

        ends: ids that end its output. compiled: what `compile_constraint` gave, if it was called before. Raises
        InvalidRequest, naming the field, for a pattern that cannot be served or that nothing of `limit` tokens matches.
        """
        asked = constraint(params)
        if asked is None:
            return None
        field, _ = asked
        if not ends:
            raise InvalidRequest(field, "a constraint", "null: this model has no token that ends an output")
        if compiled is None:
            compiled = compile_constraint(params, self._compiler)
        assert compiled is not None
        automaton = self._recalled(compiled, ends)
        if not automaton.can_finish(0, limit):
            least = automaton.tokens_left(0)
            if least == FAR:
                raise InvalidRequest(field, "a pattern that no tokens of this model spell", "another one")
            raise InvalidRequest("sampling_params.max_new_tokens", limit, f"at least {least}, for `{field}` to match")
        return OutputGuide(automaton, limit)

    def stats(self) -> dict[str, object]:
        """Grammars that are remembered, and their bytes; JSON-able."""
        return {"grammars": len(self._shared), "grammar_bytes": sum(found.bytes for found in self._shared.values())}

    def _recalled(self, compiled: bytes, ends: frozenset[int]) -> OverTokens:
        """Those used last are remembered, as many as fit; one that is forgotten lives on with its requests."""
        key = (hashlib.blake2b(compiled, digest_size=16).digest(), ends)
        if key not in self._shared:
            self._shared[key] = self._over_tokens(ByteAutomaton.from_bytes(compiled), ends)
        self._shared.move_to_end(key)
        held = sum(found.bytes for found in self._shared.values())
        while len(self._shared) > 1 and (held > SHARED_BYTES or len(self._shared) > SHARED):
            held -= self._shared.popitem(last=False)[1].bytes
        return self._shared[key]


def constraint(params: SamplingParams) -> tuple[str, str] | None:
    """(field, what it holds) of the grammar that a request asks for, or None."""
    for field in ("regex", "json_schema"):
        given: str | None = getattr(params, field)
        if given is not None:
            return f"sampling_params.{field}", given
    return None


def constraint_pattern(params: SamplingParams) -> str:
    """The regular expression of the grammar that a request asks for. Raises InvalidRequest naming the field."""
    asked = constraint(params)
    assert asked is not None
    field, given = asked
    return _unanchored(given) if field.endswith("regex") else _pattern_of_schema(given, field)


def compile_constraint(params: SamplingParams, compiler: Compiler) -> bytes | None:
    """The automaton of what a request asks for, for `Guides.make`; None if it asks for nothing. Takes up to seconds.

    Raises InvalidRequest naming the field.
    """
    asked = constraint(params)
    if asked is None:
        return None
    return compiler.compile(constraint_pattern(params), asked[0], params.stop).to_bytes()


def _unanchored(pattern: str) -> str:
    """The whole output has to match anyway; many write it out all the same."""
    body = pattern.removeprefix("^")
    slashes = len(body[:-1]) - len(body[:-1].rstrip("\\"))
    return body[:-1] if body.endswith("$") and slashes % 2 == 0 else body


def _pattern_of_schema(text: str, field: str) -> str:
    try:
        return schema_pattern(json.loads(text))
    except UnsupportedSchema as error:
        raise InvalidRequest(f"{field}{error.where.replace('/', '.')}", error.found, error.allowed) from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, text, f"a JSON Schema as JSON text ({error})") from None

"""The grammar of one request's output, and where those of all requests come from.

What a request asks for (`regex` or `json_schema`) becomes a pattern, the pattern an automaton over bytes, that one an
automaton over the model's tokens, which all requests with the same pattern and the same ends share. Knows no tensors.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.grammar.automaton import ByteAutomaton
from losa_runtime.grammar.block_paths import Block, Reach
from losa_runtime.grammar.compiler import Compiler
from losa_runtime.grammar.json_schema import UnsupportedSchema, schema_pattern
from losa_runtime.grammar.token_automaton import FAR, NOWHERE, TokenAutomaton
from losa_runtime.grammar.vocabulary import Vocabulary

SHARED = 16  # token automata that are kept, see REMEMBERED_BYTES for what each may hold


class OutputGuide:
    """What the output of one request must match. limit: its max_new_tokens. Remembers how far it has read."""

    def __init__(self, automaton: TokenAutomaton, limit: int) -> None:
        self.automaton, self.limit = automaton, limit
        self._read, self._state = 0, 0

    def reach(self, output: NDArray[np.int32], block: NDArray[np.int64]) -> Reach:
        """The paths through a block, -1 = a hole, behind finished output. block: its output positions alone."""
        return Reach(
            self.automaton, Block(block, self._behind(output), max(0, self.limit - int(output.size) - int(block.size)))
        )

    def _behind(self, output: NDArray[np.int32]) -> int:
        if output.size < self._read:  # the request was taken back further than to its last block
            self._read, self._state = 0, 0
        self._state = self.automaton.walk(output[self._read :].astype(np.int64), self._state)
        self._read = int(output.size)
        assert self._state != NOWHERE, "an output that left its grammar"
        return self._state


class Guides:
    """Makes guides. pieces: gives the bytes of every token id, empty for what is no text (special tokens, MASK)."""

    def __init__(self, pieces: Callable[[], Sequence[bytes]], compiler: Compiler | None = None) -> None:
        self._pieces, self._compiler = pieces, compiler or Compiler()
        self._vocabulary: Vocabulary | None = None
        self._shared: OrderedDict[tuple[bytes, frozenset[int]], TokenAutomaton] = OrderedDict()

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
        automaton = self._over_tokens(compiled, ends)
        if not automaton.can_finish(0, limit):
            least = automaton.tokens_left(0)
            if least == FAR:
                raise InvalidRequest(field, "a pattern that no tokens of this model spell", "another one")
            raise InvalidRequest("sampling_params.max_new_tokens", limit, f"at least {least}, for `{field}` to match")
        return OutputGuide(automaton, limit)

    def _over_tokens(self, compiled: bytes, ends: frozenset[int]) -> TokenAutomaton:
        key = (compiled, ends)
        if key not in self._shared:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._pieces())
            self._shared[key] = TokenAutomaton(ByteAutomaton.from_bytes(compiled), self._vocabulary, ends)
            while len(self._shared) > SHARED:
                self._shared.popitem(last=False)
        self._shared.move_to_end(key)
        return self._shared[key]


def constraint(params: SamplingParams) -> tuple[str, str] | None:
    """(field, what it holds) of the grammar that a request asks for, or None."""
    for field in ("regex", "json_schema"):
        given: str | None = getattr(params, field)
        if given is not None:
            return f"sampling_params.{field}", given
    return None


def compile_constraint(params: SamplingParams, compiler: Compiler) -> bytes | None:
    """The automaton of what a request asks for, for `Guides.make`; None if it asks for nothing. Takes up to seconds.

    Raises InvalidRequest naming the field.
    """
    asked = constraint(params)
    if asked is None:
        return None
    field, given = asked
    pattern = _unanchored(given) if field.endswith("regex") else _pattern_of_schema(given, field)
    return compiler.compile(pattern, field).to_bytes()


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

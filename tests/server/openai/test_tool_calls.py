"""Finding tool calls: however the text is cut, nothing is lost, and the work is linear."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_server.http.openai.tool_calls import CLOSE, OPEN, Call, ToolCallScanner

NAMES = ("f", "get weather")
CALL = Call("f", '{"x":1}')


def scan(text: str, cuts: list[int] | None = None) -> list[str | Call]:
    scanner = ToolCallScanner(NAMES)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts or []), len(text)]
    pieces = [p for a, b in pairwise(edges) for p in scanner.push(text[a:b])]
    return merged([*pieces, *scanner.finish()])


def merged(pieces: list[str | Call]) -> list[str | Call]:
    out: list[str | Call] = []
    for piece in pieces:
        if isinstance(piece, str) and out and isinstance(out[-1], str):
            out[-1] += piece
        else:
            out.append(piece)
    return out


def call(name: str = "f", arguments: str = '{"x":1}') -> str:
    return f'{OPEN}\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n{CLOSE}'


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("plain text\n", ["plain text\n"]),
        ("a < b and <tool", ["a < b and <tool"]),
        (call(), [CALL]),
        (f"I look.\n\n{call()}\n{call('get weather', '{}')}\n", ["I look.", CALL, Call("get weather", "{}")]),
        (f"{call()} then", [CALL, " then"]),
        (f'{OPEN}{{"name": "f"}}{CLOSE}', [Call("f", "{}")]),
        (call()[: -len(CLOSE)], [CALL]),
        (call()[:-1], [f'{call()[:-1]}']),
        (call("unknown"), [call("unknown")]),
        (call(arguments="[1]"), [call(arguments="[1]")]),
        (call(arguments='"{}"'), [call(arguments='"{}"')]),
        (f"{OPEN}not json{CLOSE}{call()}", [f"{OPEN}not json{CLOSE}", CALL]),
        (f"{OPEN}{OPEN}{CLOSE}{CLOSE}", [f"{OPEN}{OPEN}{CLOSE}{CLOSE}"]),
        (f"{CLOSE} x", [f"{CLOSE} x"]),
        (f"{OPEN}[" + "[" * 5000 + f"{CLOSE}", [f"{OPEN}[" + "[" * 5000 + f"{CLOSE}"]),
    ],
)  # fmt: skip
def test_what_is_found(text: str, pieces: list[str | Call]) -> None:
    assert scan(text) == pieces
    assert scan(text, list(range(len(text)))) == pieces, "one character at a time"


SIZE = len("".join(call().split()))
words = st.sampled_from([call(), call("unknown"), OPEN, CLOSE, "<tool_", "call>", "</", "x", " ", "\n", "é", "<"])


@settings(max_examples=300, deadline=None)
@given(st.lists(words, max_size=8).map("".join), st.lists(st.integers(0, 400), max_size=6))
def test_cuts_change_nothing_and_only_whitespace_is_dropped(text: str, cuts: list[int]) -> None:
    pieces = scan(text)
    assert scan(text, cuts) == pieces
    said = "".join(piece for piece in pieces if isinstance(piece, str))
    calls = [piece for piece in pieces if isinstance(piece, Call)]
    gone = len("".join(text.split())) - len("".join(said.split()))
    assert gone in (len(calls) * SIZE, len(calls) * SIZE - len(CLOSE))
    if not calls:
        assert said == text


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    scanner = ToolCallScanner(NAMES)
    assert scanner.push("Hello ") == ["Hello"]
    assert scanner.push("world <to") == [" world"]
    assert scanner.push("wel") == [" <towel"]
    assert scanner.push(OPEN + '{"name": "f"') == []
    assert scanner.push("}" + CLOSE) == [Call("f", "{}")]
    assert scanner.calls == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", [OPEN, CLOSE, "<", "<tool_call", " ", OPEN + CLOSE, f'{OPEN}{{"name":"f"}}{CLOSE}'])
def test_long_texts_take_linear_time(unit: str) -> None:
    """Quadratic work on this would run into the time limit."""
    text = unit * (2_000_000 // len(unit))
    scanner = ToolCallScanner(NAMES)
    for at in range(0, len(text), 1000):
        scanner.push(text[at : at + 1000])
    scanner.finish()

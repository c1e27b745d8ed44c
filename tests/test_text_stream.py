"""Stop strings over borders: the stream equals `decode everything, find the stop that is complete first`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_runtime.text_stream import TextStream


class Pieces:
    """A detokenizer whose token i is the i-th piece of a text; a piece that ends in ~ is held until the next push."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces, self.held = pieces, ""

    def push(self, ids: Sequence[int]) -> str:
        text = ""
        for i in ids:
            piece, self.held = self.held + self.pieces[i].removesuffix("~"), ""
            if self.pieces[i].endswith("~"):
                piece, self.held = "", piece
            text += piece
        return text

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text


def first_complete(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(end, stop) of the stop that is complete first; of several the longest."""
    found = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    return (min(found)[0], min(found)[2]) if found else None


alphabet = st.sampled_from("ab.")
text_pieces = st.lists(st.text(alphabet, max_size=4), max_size=12)
stop_strings = st.lists(st.text(alphabet, min_size=1, max_size=5), max_size=4).map(tuple)


@settings(max_examples=600, deadline=None)
@given(text_pieces, stop_strings, st.booleans(), st.lists(st.integers(0, 12), max_size=4), st.data())
def test_equals_the_search_in_the_whole_text(
    pieces: list[str], stops: tuple[str, ...], keep: bool, cuts: list[int], data: st.DataObject
) -> None:
    pieces = [p + data.draw(st.sampled_from(["", "", "~"])) for p in pieces]
    stream = TextStream(Pieces(pieces), stops, no_stop_trim=keep)
    borders = sorted({0, len(pieces), *(c for c in cuts if c < len(pieces))})
    blocks = [list(range(a, b)) for a, b in pairwise(borders)] or [[]]
    whole = "".join(p.removesuffix("~") for p in pieces)
    hit = first_complete(whole, stops)
    wanted = whole if hit is None else whole[: hit[0] if keep else hit[0] - len(hit[1])]
    shown, used, matched = "", 0, None
    for number, ids in enumerate(blocks):
        text, consumed, matched = stream.push(ids, final=number == len(blocks) - 1)
        shown += text
        used += len(ids) if consumed is None else consumed
        assert wanted.startswith(shown)
        assert (consumed is None) == (matched is None)
        if matched is not None:
            break
    assert shown == wanted
    assert matched == (hit[1] if hit else None)
    if hit:
        # The tokens kept are the fewest whose final text holds the stop.
        least = next(n for n in range(len(pieces) + 1) if hit[0] <= len(text_of(pieces, n, used == len(pieces))))
        assert used == least


def text_of(pieces: list[str], count: int, may_flush: bool) -> str:
    stream = Pieces(pieces)
    text = "".join(stream.push([i]) for i in range(count))
    return text + stream.flush() if may_flush and count == len(pieces) else text


def test_text_flows_at_once_without_stop_strings() -> None:
    stream = TextStream(Pieces(["a", "b~", "c", "d~"]))
    assert stream.push([0, 1]).text == "a"
    assert stream.push([2]) == ("bc", None, None)
    assert stream.push([3], final=True).text == "d"


def test_only_what_may_become_a_stop_is_held_back() -> None:
    stream = TextStream(Pieces(["one\n", "\n", "two\n\n", "END", "more"]), ("\n\nEND",))
    assert [stream.push([i]).text for i in range(3)] == ["one", "", "\n\ntwo"]
    assert stream.push([3, 4]) == ("", 1, "\n\nEND")


@pytest.mark.parametrize("pieces", [["abcd"], ["ab", "cd"], list("abcd")])
def test_the_stop_that_is_complete_first_counts_however_tokens_are_cut(pieces: list[str]) -> None:
    stream = TextStream(Pieces(pieces), ("abcd", "c", "bc"))
    got = stream.push(list(range(len(pieces))))
    assert (got.text, got.matched) == ("a", "bc")


def test_final_releases_a_suffix_that_was_no_stop_after_all() -> None:
    stream = TextStream(Pieces(["text", " EN"]), (" END",))
    assert stream.push([0, 1]).text == "text"
    assert stream.push([], final=True) == (" EN", None, None)


def test_a_stop_completed_by_the_last_held_character() -> None:
    stream = TextStream(Pieces(["x", "E", "ND~"]), ("END",), no_stop_trim=True)
    assert stream.push([0, 1, 2], final=True) == ("xEND", 3, "END")


def test_long_stop_strings_cost_a_step_per_character() -> None:
    """A stop that almost matches everywhere: quadratic searching would take minutes here."""
    stops = tuple("a" * 1000 + chr(98 + i) for i in range(20))
    stream = TextStream(Pieces(["a" * 500] * 40), stops)
    text = "".join(stream.push([i]).text for i in range(40))
    assert text == "a" * (40 * 500 - 1000)

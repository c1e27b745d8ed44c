"""The process that compiles: it agrees with Python's regular expressions, and nothing can take it hostage."""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections.abc import Iterator

import pytest

from losa_runtime.core.errors import InvalidRequest
from losa_runtime.grammar.automaton import ByteAutomaton
from losa_runtime.grammar.compile_worker import MARK, compile_pattern
from losa_runtime.grammar.compiler import MAX_PATTERN, Compiler
from tests.grammar.patterns import LETTERS, random_pattern

HOSTILE = ("((a{1,100}){1,100}){1,100}", "a{1,1000000}", r"(\w{1,99}){1,99}", r"(.|\n){0,90000}")


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    found = Compiler()
    yield found
    found.close()


def accepts(automaton: ByteAutomaton, text: str) -> bool:
    state = automaton.walk(text.encode())
    return state >= 0 and bool(automaton.accepting_S[state])


@pytest.mark.parametrize("pattern", [r"\d", r"\w", r"[x\d-]", r"a*\\\\d|\d", r"[\w&&[^_]]"])
def test_digits_and_letters_are_those_that_python_knows(pattern: str) -> None:
    """Unicode goes on: code points that are no characters yet in one table are digits in another."""
    automaton, found = compile_pattern(pattern), 0
    python = re.compile(pattern.replace("[\\w&&[^_]]", "[^\\W_]"))
    for number in range(0x20000):
        if not 0xD800 <= number < 0xE000 and accepts(automaton, chr(number)):
            assert python.fullmatch(chr(number)), hex(number)
            found += 1
    assert found > 300


def test_ascii_is_left_as_it_is() -> None:
    automaton = compile_pattern(r"(?-u:\d\w)")
    assert accepts(automaton, "1_") and not accepts(automaton, "1é")


def test_agrees_with_python() -> None:
    rng = random.Random(0)
    for _ in range(150):
        pattern = random_pattern(rng)
        automaton = compile_pattern(pattern)
        for _ in range(30):
            text = "".join(rng.choice(LETTERS + "\nü𝄞") for _ in range(rng.randint(0, 6)))
            assert accepts(automaton, text) == (re.fullmatch(pattern, text) is not None), (pattern, text)


def test_matches_hold_none_of_some_strings() -> None:
    rng, left = random.Random(1), 0
    for _ in range(80):
        pattern = random_pattern(rng)
        without = ["".join(rng.choice("abcé0") for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(1, 3))]
        automaton = None
        with contextlib.suppress(ValueError):  # nothing is left to match
            automaton = compile_pattern(pattern, without)
        left += automaton is not None
        for _ in range(40):
            text = "".join(rng.choice(LETTERS + "abcé0") for _ in range(rng.randint(0, 6)))
            wanted = re.fullmatch(pattern, text) is not None and not any(each in text for each in without)
            assert (automaton is not None and accepts(automaton, text)) == wanted, (pattern, without, text)
    assert left > 40


def test_bytes_left_is_the_shortest_way_out() -> None:
    automaton = compile_pattern("a(bc|def)g?|é")
    assert automaton.bytes_left_S[0] == 2  # é has two bytes
    assert automaton.bytes_left_S[automaton.walk(b"ad")] == 2
    assert automaton.bytes_left_S[automaton.walk(b"abc")] == 0


def test_travels_as_bytes() -> None:
    automaton = compile_pattern(r"[a-z]{2,5}é?")
    again = ByteAutomaton.from_bytes(automaton.to_bytes())
    assert accepts(again, "abcé") and not accepts(again, "aé")
    data = automaton.to_bytes()
    for broken in (b"", data[:-1], data[:30], data.replace(b"losa", b"lost"), data[:-600] + b"\x7f" * 600):
        with pytest.raises(ValueError, match=r"automaton|Expecting"):
            ByteAutomaton.from_bytes(broken)


def test_the_mark_is_never_matched() -> None:
    assert not accepts(compile_pattern(".*"), f"a{MARK}")


@pytest.mark.parametrize(
    "pattern", ["(", "a)(b", "[b-a]", "a{3,2}", r"(a)\1", "a(?=b)", r"\p{Nope}", "[^\\x00-\\x{10FFFF}]"]
)
def test_what_is_no_pattern_is_refused(compiler: Compiler, pattern: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        compiler.compile(pattern, "sampling_params.regex")
    assert refusal.value.field == "sampling_params.regex"


def test_too_long_a_pattern_is_refused(compiler: Compiler) -> None:
    with pytest.raises(InvalidRequest, match="at most"):
        compiler.compile("a" * (MAX_PATTERN + 1), "regex")


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_hostile_pattern_is_refused_in_time_and_the_next_one_is_served(compiler: Compiler, pattern: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "time_limit_s", 30.0)
        compiler.compile("warm", "regex")
    began = time.process_time()
    with pytest.raises(InvalidRequest, match="that compiles within"):
        compiler.compile(pattern, "regex")
    assert time.process_time() - began < 1.0  # of this process: the work is another's
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "time_limit_s", 30.0)  # on a busy machine
        assert accepts(compiler.compile(f"after({len(pattern)})+", "regex"), f"after{len(pattern)}")


def test_many_stop_strings_are_refused_in_time_too(compiler: Compiler) -> None:
    stops = tuple("ab" * 120 + chr(97 + i) for i in range(16))
    with pytest.raises(InvalidRequest, match=r"that compiles within|at most"):
        compiler.compile("[ab]{3000}", "regex", stops)


def test_one_pattern_with_and_without_stop_strings_are_two() -> None:
    compiler = Compiler(time_limit_s=30.0)
    assert accepts(compiler.compile("[ab]+", "regex"), "aba")
    assert not accepts(compiler.compile("[ab]+", "regex", ("ba",)), "aba")
    assert compiler.recall(("[ab]+", ("ba",))) is not compiler.recall(("[ab]+", ())) is not None
    assert compiler.remembered[0] == 2
    compiler.close()


def test_what_is_known_does_not_wait_for_what_is_hostile() -> None:
    compiler = Compiler(time_limit_s=30.0)
    compiler.compile("known", "regex")
    refused = threading.Event()

    def hostile() -> None:
        with pytest.raises(InvalidRequest):
            compiler.compile(HOSTILE[0], "regex")
        refused.set()

    thread = threading.Thread(target=hostile)
    thread.start()
    while not compiler._lock.locked():
        time.sleep(0.01)
    assert accepts(compiler.compile("known", "regex"), "known") and not refused.is_set()
    time.sleep(0.2)  # so that its worker has the pattern, as a rule; a new one would be given its 30 seconds
    assert compiler._worker is not None
    compiler._worker.kill()
    thread.join(90)
    assert refused.is_set()
    compiler.close()

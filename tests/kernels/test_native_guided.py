"""Guided blocks in C++ against numpy, which is itself held to trying everything (tests/grammar)."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import pytest

from losa_kernels.native.guided import FAR, Automaton, BlockChoices, Blocks, Grammar, Limits, Words
from losa_runtime.grammar.automaton import ByteAutomaton
from losa_runtime.grammar.block_paths import Block
from losa_runtime.grammar.compile_worker import compile_pattern
from losa_runtime.grammar.guide import OutputGuide
from losa_runtime.grammar.token_automaton import TokenAutomaton
from losa_runtime.grammar.vocabulary import Vocabulary
from losa_runtime.runner.choices import Choices, GuidedBlock, HoleRows, NativeChoices, Proposal, ReferenceChoices
from tests.grammar.patterns import LETTERS, random_pattern
from tests.grammar.toy import END, PIECES, text_of, usable
from tests.kernels.native import require_native

PLENTY = Limits(4096, 1024, 1 << 26, 1 << 27)
TOY_PATTERNS = ("", "a*", "(ab)*", "a{2,3}|b", "(a|bé*)+b?", "é{1,2}", "[^a]*", "(ab|abb)é?", "b.{0,2}a")


class World(NamedTuple):
    """A vocabulary in both forms. end: the id that ends an output."""

    words: Words
    vocabulary: Vocabulary
    end: int

    def both(self, automaton: ByteAutomaton, limits: Limits = PLENTY) -> tuple[Grammar, TokenAutomaton]:
        """An automaton over the tokens, in C++ and by numpy."""
        table = Automaton(automaton.next_SC, automaton.class_B, automaton.accepting_S, automaton.bytes_left_S)
        ends = frozenset({self.end})
        slow = TokenAutomaton(automaton, self.vocabulary, ends, limits.bytes)
        return Grammar(self.words, table, [self.end], limits), slow


def world(pieces: list[bytes], end: int) -> World:
    return World(Words(require_native(), pieces), Vocabulary(pieces), end)


def made_up(rng: random.Random, size: int) -> World:
    """Bytes, pieces of text, some of them twice, some without any text, in no order."""
    pieces = [bytes((byte,)) for byte in range(256)] + [b""] * 3
    pieces += ["".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 5))).encode() for _ in range(size)]
    pieces.append(pieces[-1])
    rng.shuffle(pieces)
    return world(pieces, pieces.index(b""))


def some_block(rng: random.Random, grammar: TokenAutomaton, length: int) -> Block:
    """Some way through an automaton, with holes in it."""
    states = [rng.randrange(grammar.done)]
    tokens: list[int] = []
    for _ in range(length):
        found = grammar.row(states[-1]) if states[-1] != grammar.done else None
        if found is None or not found.targets.size:
            tokens.append(int(grammar.ends[0]))
            states.append(grammar.done)
            continue
        group = rng.randrange(found.targets.size)
        ids = found.shape.ids[found.shape.group_of_id == group]
        tokens.append(int(rng.choice(ids.tolist())))
        states.append(int(found.targets[group]))
    known = np.array([-1 if rng.random() < 0.6 else token for token in tokens])
    known[rng.randrange(length)] = -1
    room = 0 if grammar.accepting(states[-1]) else grammar.tokens_left(states[-1])
    return Block(known, states[0], room + rng.randint(0, 3))


def some_rows(rng: np.random.Generator, holes: int, width: int, filtered: bool) -> HoleRows:
    logits = (rng.normal(size=(holes, width)) * 3).astype(np.float32)
    sharpness = rng.choice([0.5, 1.0, 2.0], size=holes)
    total = np.log(np.exp(logits.astype(np.float64) * sharpness[:, None]).sum(1))
    kept = rng.random((holes, width)) < 0.3 if filtered else None
    return HoleRows(logits, kept, sharpness, total, rng.random(holes))


def chosen(
    kind: type[NativeChoices] | type[ReferenceChoices],
    parts: list[tuple[OutputGuide, Block, bool, bool]],
    rows: HoleRows,
) -> Choices:
    blocks = [
        GuidedBlock(guide, block, np.flatnonzero(block.tokens < 0), path, drawn) for guide, block, path, drawn in parts
    ]
    return kind(blocks, rows)


def same(one: Proposal, other: Proposal) -> None:
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.confidence == pytest.approx(other.confidence, rel=1e-6, abs=1e-12)
    assert one.logprob == pytest.approx(other.logprob, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("filtered", [False, True], ids=["all", "filtered"])
def test_many_blocks_in_one_call_are_chosen_and_settled_as_by_numpy(filtered: bool) -> None:
    rng, generator = random.Random(5), np.random.default_rng(5)
    for _ in range(12):
        here = made_up(rng, 200)
        guides = [here.both(compile_pattern(random_pattern(rng))) for _ in range(3)]
        mine: list[tuple[OutputGuide, Block, bool, bool]] = []
        theirs: list[tuple[OutputGuide, Block, bool, bool]] = []
        for _ in range(8):
            grammar, automaton = rng.choice(guides)
            block, how = some_block(rng, automaton, rng.randint(1, 8)), (rng.random() < 0.5, rng.random() < 0.5)
            mine.append((OutputGuide(grammar, 99), block, *how))
            theirs.append((OutputGuide(automaton, 99), block, *how))
        holes = sum(int((block.tokens < 0).sum()) for _, block, _, _ in mine)
        rows = some_rows(generator, holes, here.words.size + rng.randint(0, 5), filtered)
        fast, slow = chosen(NativeChoices, mine, rows), chosen(ReferenceChoices, theirs, rows)
        same(fast.proposal, slow.proposal)
        accepted = generator.random(holes) < 0.6
        same(fast.settle(accepted), slow.settle(accepted))
        same(fast.proposal, slow.proposal)  # settling leaves it as it was
        first = 0
        for part in mine:
            size = int((part[1].tokens < 0).sum())
            few = HoleRows(*(None if column is None else column[first : first + size] for column in rows))  # type: ignore[arg-type]
            alone = chosen(NativeChoices, [part], few).proposal
            assert alone.tokens.tolist() == fast.proposal.tokens[first : first + size].tolist()
            assert alone.confidence.tolist() == fast.proposal.confidence[first : first + size].tolist()
            first += size


def test_states_behind_tokens_and_tokens_to_an_end_are_those_of_numpy() -> None:
    rng = random.Random(6)
    for _ in range(20):
        here = made_up(rng, 60)
        grammar, automaton = here.both(compile_pattern(random_pattern(rng)))
        for state in range(automaton.done + 1):
            if state != automaton.done:
                assert grammar.tokens_left(state) == automaton.tokens_left(state)
            for room in range(4):
                assert grammar.can_finish(state, room) == automaton.can_finish(state, room)
            for token in rng.sample(range(here.words.size), 20):
                assert grammar.walk(np.array([token]), state) == automaton.step(state, token)
        block = some_block(rng, automaton, 6).tokens
        block[block < 0] = here.end
        assert grammar.walk(block) == automaton.walk(block)


def test_what_no_tokens_spell_is_far_away() -> None:
    grammar, _ = world([b"a", b""], 1).both(compile_pattern("ab"))
    assert grammar.tokens_left(0) == FAR and not grammar.can_finish(0, 1000)


def test_a_search_that_takes_too_long_counts_single_bytes() -> None:
    rng = random.Random(7)
    here = made_up(rng, 200)
    automaton = compile_pattern("[a-z0-9 ]{40}")
    hasty, _ = here.both(automaton, PLENTY._replace(work=1))
    patient, _ = here.both(automaton)
    assert hasty.tokens_left(0) == 40 > patient.tokens_left(0)
    assert hasty.can_finish(0, 40) and not hasty.can_finish(0, 39)


def test_rows_that_are_forgotten_come_back() -> None:
    rng, generator = random.Random(8), np.random.default_rng(8)
    here = made_up(rng, 200)
    automaton = compile_pattern("(?:[a-z]{1,3} )*[0-9]")
    keeping, other = here.both(automaton)
    grammar, _ = here.both(automaton, PLENTY._replace(bytes=keeping.bytes + 1))  # of what it holds without any rows
    before = grammar.bytes
    for _ in range(3):
        block = some_block(rng, other, 6)
        rows = some_rows(generator, int((block.tokens < 0).sum()), here.words.size, False)
        found = [
            chosen(NativeChoices, [(OutputGuide(g, 99), block, True, False)], rows).proposal for g in (grammar, keeping)
        ]
        assert found[0].tokens.tolist() == found[1].tokens.tolist()
        assert grammar.bytes > before
    assert grammar.bytes < keeping.bytes  # only the rows of the last block


@pytest.mark.parametrize("path", [True, False])
def test_a_block_that_needs_more_rows_than_are_remembered_is_refused(path: bool) -> None:
    here = made_up(random.Random(12), 200)
    automaton = compile_pattern("[ -~]*(?:a|b)[ -~]{5}")  # each of its states has other groups
    rows = some_rows(np.random.default_rng(12), 8, here.words.size, False)
    block, kinds = Block(np.full(8, -1), 0, 9), ((NativeChoices, 0), (ReferenceChoices, 1))
    least = 0
    for limit in (0, *(1 << n for n in range(8, 20)), 1 << 27):
        refused = []
        for kind, which in kinds:
            guide = OutputGuide(here.both(automaton, PLENTY._replace(bytes=limit))[which], 99)
            try:
                chosen(kind, [(guide, block, path, False)], rows)
            except ValueError as error:
                refused.append(str(error).removeprefix("losa_guide: "))
        assert refused in ([], [f"the states of a block have more than {limit} bytes of tokens"] * 2)
        least = limit if refused else least
    assert 1 << 12 <= least < 1 << 19


def test_states_with_very_many_tokens_are_filled_by_likely_ones() -> None:
    rng, generator = np.random.default_rng(9), np.random.default_rng(10)
    here = world(list(PIECES), END)
    for pattern in TOY_PATTERNS:
        grammar, _ = here.both(compile_pattern(pattern), Limits(1, 2, 1 << 20, 1 << 20))
        for _ in range(20):
            known = np.where(rng.random(4) < 0.7, -1, rng.choice([0, 1, 2, 5, END], 4))
            known[rng.integers(4)] = -1
            room = int(rng.integers(3))
            fillings = usable(pattern, known.tolist(), room)
            holes = np.flatnonzero(known < 0)
            rows = some_rows(generator, holes.size, len(PIECES), False)
            for path, drawn in ((True, False), (True, True), (False, False), (False, True)):
                part = (OutputGuide(grammar, 9), Block(known, 0, room), path, drawn)
                if not fillings:
                    with pytest.raises(ValueError, match="no token sequence"):
                        chosen(NativeChoices, [part], rows)
                    continue
                found = chosen(NativeChoices, [part], rows)
                settled = found.settle(np.ones(holes.size, dtype=bool))
                tokens = known.copy()
                tokens[holes] = settled.tokens
                assert text_of(tokens.tolist()) in {text_of(filling) for filling in fillings}
                assert (found.proposal.confidence <= 1).all() and (found.proposal.confidence >= 0).all()


def test_a_single_likely_token_of_a_wide_state_is_nearly_sure() -> None:
    here = made_up(random.Random(11), 200)
    grammar, automaton = here.both(compile_pattern(".{8}"), Limits(10, 4, 1 << 20, 1 << 20))
    rows = some_rows(np.random.default_rng(11), 1, here.words.size, False)
    wanted = int(automaton.row(0).shape.ids[0])
    rows.logits_nV[0, wanted] = 30.0
    rows.total_n[0] = np.log(np.exp(rows.logits_nV[0].astype(np.float64) * rows.sharpness_n[0]).sum())
    for path in (True, False):
        part = (OutputGuide(grammar, 99), Block(np.array([-1]), 0, 50), path, False)
        found = chosen(NativeChoices, [part], rows).proposal
        assert found.tokens.tolist() == [wanted] and found.confidence[0] > 0.99


def test_what_is_no_block_is_refused() -> None:
    here = world(list(PIECES), END)
    grammar, _ = here.both(compile_pattern("a*"))
    good = {
        "grammars": [grammar],
        "tokens": [np.array([-1, 0])],
        "states": [0],
        "rooms": [0],
        "path": [True],
        "drawn": [False],
        "logits": np.zeros((1, 9), dtype=np.float32),
        "kept": None,
        "sharpness": np.ones(1),
        "total": np.zeros(1),
        "uniform": np.zeros(1),
    }
    kernels = require_native()
    BlockChoices(kernels, Blocks(**good))  # type: ignore[arg-type]
    for field, value, why in (
        ("states", [7], "state 7"),
        ("states", [-1], "state -1"),
        ("rooms", [-1], "room -1"),
        ("tokens", [np.array([-1, 9])], "token 9"),
        ("tokens", [np.array([-1, -2])], "token -2"),
        ("tokens", [np.array([-1, -1])], "2 holes"),
        ("logits", np.zeros((1, 8), dtype=np.float32), "8 of 9 ids"),
        ("sharpness", np.ones(2), "sharpness"),
        ("kept", np.ones((1, 8), dtype=bool), "kept"),
        ("tokens", [np.array([1, -1])], "no token sequence"),
    ):
        with pytest.raises(ValueError, match=why):
            BlockChoices(kernels, Blocks(**(good | {field: value})))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accepted"):
        BlockChoices(kernels, Blocks(**good)).settle(np.ones(2, dtype=bool))  # type: ignore[arg-type]
    wide = good | {"logits": np.zeros((1, 12), dtype=np.float32), "path": [False]}  # behind the ids lies padding
    for token in (-1, 9, 11):
        choices = BlockChoices(kernels, Blocks(**wide))  # type: ignore[arg-type]
        choices.chosen.tokens[0] = token
        with pytest.raises(ValueError, match=f"chosen: found {token}"):
            choices.settle(np.ones(1, dtype=bool))


def test_what_is_no_grammar_is_refused() -> None:
    here = world(list(PIECES), END)
    made = compile_pattern("ab*")
    table = Automaton(made.next_SC, made.class_B, made.accepting_S, made.bytes_left_S)
    for broken, why in (
        (table._replace(next=np.full_like(made.next_SC, 99)), "state 99"),
        (table._replace(class_of=np.full_like(made.class_B, 200)), "class 200"),
        (table._replace(accepting=made.accepting_S[:1]), "accepting"),
    ):
        with pytest.raises(ValueError, match=why):
            Grammar(here.words, broken, [END], PLENTY)
    with pytest.raises(ValueError, match="end 9"):
        Grammar(here.words, table, [9], PLENTY)
    with pytest.raises(ValueError, match="0 ids"):
        Words(require_native(), [])
    grammar, _ = here.both(made)
    with pytest.raises(ValueError, match="tokens: found 77"):
        grammar.walk(np.array([77]))
    with pytest.raises(ValueError, match="state: found 50"):
        grammar.tokens_left(50)

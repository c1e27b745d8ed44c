"""Teacher-forced blocks: whole blocks before them, true tokens in them, everything revealed once."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality.samples import LATE_KEY, documents
from benchmarks.quality.scripts import Encode, Revealed, Script, answers, late_keys, per_step
from benchmarks.tiny_model import corpus
from losa_runtime.tokenizer import Tokenizer

BLOCK, END, FILL, MASK = 16, 2, 0, 3


@pytest.fixture(scope="module")
def tokenizer(bundled_checkpoint: Path) -> Tokenizer:
    return Tokenizer(bundled_checkpoint, MASK)


def late(encode: Encode) -> list[Script]:
    [asked] = documents(LATE_KEY, 512, 4, 4, seed=3)
    return list(late_keys(asked, encode, BLOCK))


def text(tokenizer: Tokenizer, tokens: tuple[int, ...]) -> str:
    """Without special tokens."""
    return tokenizer.decode([token for token in tokens if token > MASK])


def test_a_late_key_is_a_sentence_of_the_document_said_again(tokenizer: Tokenizer) -> None:
    for script in late(tokenizer.encode):
        assert len(script.stored) % BLOCK == 0
        assert len(script.tokens) == BLOCK
        said = text(tokenizer, script.tokens).strip()
        assert said.startswith("Remember that the secret code of the")
        assert said.removeprefix("Remember that the ") in text(tokenizer, script.stored)
        digits = "".join(text(tokenizer, (script.tokens[offset],)) for offset in sorted(script.scored))
        assert said.endswith(f" {digits}.")
        assert len(digits) == 4


def test_the_key_stands_before_any_digit_is_asked_for(tokenizer: Tokenizer) -> None:
    for script in late(tokenizer.encode):
        assert script.order is not None
        revealed = Revealed(script, script.order)
        first = next(step for step, counting in enumerate(per_step(script.order, script.scored)) if counting)
        seen = revealed.tokens(first, MASK)
        assert MASK not in seen[: min(script.scored)]
        assert set(seen[min(script.scored) :]) == {MASK}
        assert first == 5
        opening = revealed.tokens(0, MASK)
        assert opening == [script.tokens[0]] + [MASK] * (BLOCK - 1)


def test_every_offset_is_revealed_once(tokenizer: Tokenizer) -> None:
    for script in late(tokenizer.encode):
        assert script.order is not None
        offsets = [offset for some in script.order for offset in some]
        assert sorted(offsets) == list(range(script.known, BLOCK))
        revealed = Revealed(script, script.order)
        assert revealed.tokens(len(script.order), MASK) == list(script.tokens)
        assert revealed.unmasked(len(script.order)) == BLOCK - script.known
        assert sum(map(len, per_step(script.order, script.scored))) == len(script.scored)


def test_answers_are_cut_into_blocks(tokenizer: Tokenizer) -> None:
    [asked] = documents("multi_value", 512, 3, 3, seed=4)
    for question, prompt in zip(asked.questions, asked.prompts, strict=True):
        mine = list(answers(asked._replace(questions=(question,)), tokenizer.encode, BLOCK, END, FILL))
        scored = [script.tokens[offset] for script in mine for offset in sorted(script.scored)]
        assert scored == [*tokenizer.encode(question.answer), END]
        whole = [*mine[-1].stored, *mine[-1].tokens]
        assert whole[: len(tokenizer.encode(prompt))] == tokenizer.encode(prompt)
        assert all(len(script.stored) % BLOCK == 0 and len(script.tokens) == BLOCK for script in mine)
        assert corpus.count_tokens(question.answer) + 1 == len(scored)

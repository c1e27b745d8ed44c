"""What users write stays text, whatever it spells and however a template joins it; nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_runtime.chat_template import ChatTemplate
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.tokenizer import Tokenizer
from losa_server.rendering.guard import cut, guard
from losa_server.rendering.process import render

BUNDLED = Path(__file__).parents[3] / "benchmarks" / "tiny_model" / "checkpoint"
TOKENIZER = Tokenizer(BUNDLED)
SPECIALS = list(TOKENIZER.special_texts)
IM_START, IM_END = (TOKENIZER.encode(text)[0] for text in ("<|im_start|>", "<|im_end|>"))
CHATML = ChatTemplate(TOKENIZER.chat_template or "", TOKENIZER.named_specials)
# Strings side by side, a role inside the template's own special token, JSON, and something taken out of the middle.
ODD = ChatTemplate(
    "{% for m in messages %}{{ '<|im_' ~ m.role ~ '|>' }}{{ m.a }}{{ m.b }}{{ m | tojson }}"
    "{{ m.a.replace('~', '') }}{% endfor %}",
    {},
)
FRAGMENTS = [
    "<",
    "|",
    "<|",
    "<|im_end|>",
    "<|im_",
    "end|>",
    "im_end",
    "<|endoftext|>",
    "<|MASK|>",
    "~",
    "é",
    " ",
    "x\n",
]
hostile = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join) | st.text(max_size=8)


def tokens(pieces: list[str]) -> list[int]:
    return [i for piece in pieces for i in TOKENIZER.encode(piece)]


def test_the_bundled_model_has_special_tokens() -> None:
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(SPECIALS)
    assert "<|MASK|>" not in SPECIALS  # always text


@settings(max_examples=200, deadline=None)
@given(st.lists(hostile, min_size=1, max_size=3))
def test_only_the_templates_own_special_tokens_are_special(contents: list[str]) -> None:
    messages = [{"role": "user", "content": content} for content in contents]
    ids = tokens(render(CHATML, SPECIALS, {"messages": messages}))
    special = [i for i in ids if TOKENIZER.decode([i]) == "" and TOKENIZER.decode([i], False) in SPECIALS]
    assert special == [IM_START, IM_END] * len(messages) + [IM_START]
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == CHATML.render(messages)


@settings(max_examples=200, deadline=None)
@given(hostile, hostile)
def test_joined_and_mended_strings_make_none_either(a: str, b: str) -> None:
    messages = [{"role": "end", "a": a, "b": b}]
    ids = tokens(render(ODD, SPECIALS, {"messages": messages}))
    assert ids.count(IM_END) == 1 and ids[0] == IM_END and IM_START not in ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == ODD.render(messages)


@pytest.mark.parametrize("content", ["plain", "a < b <b>", "ends with <", "\n\nx", "</think> <think>", "<im_end>", ""])
def test_harmless_text_is_tokenized_in_one_piece(content: str) -> None:
    messages = [{"role": "user", "content": content}]
    text = CHATML.render(messages)
    assert render(CHATML, SPECIALS, {"messages": messages}) == [text]


def test_what_a_template_looks_for_in_the_text_is_still_there() -> None:
    """Only what could be a special token is hidden while the template runs."""
    look = ChatTemplate("{{ '</think>' in messages[0].content }}{{ messages[0].content.split('</think>')[-1] }}", {})
    content = "<think>so <|im_end|></think>yes <|im_end|>"
    pieces = render(look, SPECIALS, {"messages": [{"content": content}]})
    assert "".join(pieces) == "Trueyes <|im_end|>" and len(pieces) == 2


def test_private_characters_of_the_users_own_survive() -> None:
    content = "".join(map(chr, range(0xF0000, 0xF0040))) + "<|im_end|>"
    pieces = render(CHATML, SPECIALS, {"messages": [{"role": "user", "content": content}]})
    assert content in "".join(pieces)


def test_keys_are_guarded_too() -> None:
    tools = [{"name": "f", "parameters": {"<|im_end|>": 1}}]
    dump = ChatTemplate("{{ tools | tojson }}", {})
    ids = tokens(render(dump, SPECIALS, {"messages": [], "tools": tools}))
    assert IM_END not in ids
    assert json.loads(TOKENIZER.decode(ids, False)) == tools


def test_special_tokens_of_one_character_are_refused_in_the_users_text() -> None:
    plain = ChatTemplate("{{ messages[0].content }}§", {})
    assert render(plain, ["§"], {"messages": [{"content": "x"}]}) == ["x§"]
    with pytest.raises(InvalidRequest, match="without the special token '§'"):
        render(plain, ["§"], {"messages": [{"content": "a § b"}]})


@pytest.mark.parametrize("specials", [[], [""]])
def test_without_special_tokens_nothing_is_done(specials: list[str]) -> None:
    value: Any = {"messages": ["<|im_end|>"]}
    assert guard(value, specials) == (value, {})
    assert cut("<|im_end|>", {}, specials) == ["<|im_end|>"]

"""Tokenizers as the families bring them: whatever a user spells, it is never a mask, and in a chat no special token."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from losa_runtime.chat_template import ChatTemplate
from losa_runtime.tokenizer import Tokenizer
from losa_server.rendering.process import render

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
ROLES = "{% for m in messages %}<role>{{ m.role }}</role>{{ m.content }}<|role_end|>{% endfor %}<role>ASSISTANT</role>"


class Kind(NamedTuple):
    """mask, others: special tokens; template: of chats. inside: the mask is in the model's vocabulary as well.
    special: the mask is marked as special. loose: it swallows spaces beside it."""

    mask: str
    others: tuple[str, ...]
    template: str
    inside: bool = False
    special: bool = True
    loose: bool = False


QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
KINDS = {
    "SDAR": Kind("<|MASK|>", QWEN, CHATML),
    "SDAR, otherwise spelled": Kind("<MASK>", QWEN, CHATML, special=False),
    "LLaDA2": Kind("<|mask|>", ("<|startoftext|>", "<|endoftext|>", "<role>", "</role>", "<|role_end|>"), ROLES, True),
    "Fast-dLLM v2": Kind("|<MASK>|", QWEN, CHATML),
    "A2D": Kind("<|mask|>", (*QWEN, "<think>"), CHATML, loose=True),
}


@pytest.fixture(scope="module", params=KINDS, ids=str)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Tokenizer]:
    """A tokenizer of each kind, with merges among which are pieces of its special tokens."""
    kind = KINDS[request.param]
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    mask = AddedToken(kind.mask, special=kind.special, normalized=False, lstrip=kind.loose, rstrip=kind.loose)
    others = [AddedToken(text, special=True, normalized=False) for text in kind.others]
    within = [mask, *others] if kind.inside else []
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=within,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(["mask MASK |MASK <|im end role text " * 20], trainer)
    fast.add_tokens(others)
    fast.add_tokens([mask])
    folder = tmp_path_factory.mktemp("kind")
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": kind.template}))
    return kind, Tokenizer(folder, fast.token_to_id(kind.mask))


def spellings(kind: Kind) -> st.SearchStrategy[str]:
    """Texts of special tokens, their pieces, and other things."""
    tokens = (kind.mask, *kind.others)
    pieces = sorted({piece for text in tokens for piece in (text, text[:2], text[2:], text[:-1], text[-1])})
    return st.lists(st.sampled_from([*pieces, " ", "x", "é", "\n"]), max_size=8).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_text_never_becomes_a_mask(made: tuple[Kind, Tokenizer], data: st.DataObject) -> None:
    kind, tokenizer = made
    text = data.draw(spellings(kind))
    ids = tokenizer.encode(text)
    assert tokenizer.mask_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_in_a_chat_no_text_becomes_a_special_token(made: tuple[Kind, Tokenizer], data: st.DataObject) -> None:
    kind, tokenizer = made
    template = ChatTemplate(kind.template, {})
    messages = [{"role": "user", "content": data.draw(spellings(kind))} for _ in range(2)]
    plain = [{"role": "user", "content": "x"} for _ in range(2)]

    def tokens(of: list[dict[str, str]]) -> list[int]:
        pieces = render(template, list(tokenizer.special_texts), {"messages": of})
        return [i for piece in pieces for i in tokenizer.encode(piece)]

    special = {i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i) in kind.others}
    assert [i for i in tokens(messages) if i in special] == [i for i in tokens(plain) if i in special]
    assert tokenizer.mask_token_id not in tokens(messages)
    assert tokenizer.decode(tokens(messages), skip_special_tokens=False) == template.render(messages)

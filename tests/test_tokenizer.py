"""Text to ids and back: special tokens, the mask that must stay text, and text that arrives token by token."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from losa_runtime.core.errors import CheckpointError, InvalidRequest
from losa_runtime.models.random_checkpoint import IM_END, IM_START, MASK, write_random_checkpoint
from losa_runtime.tokenizer import Detokenizer, Tokenizer, byte_alphabet

SAMPLES = ["", "plain", "naïve café", "日本語テキスト", "🙂👨‍👩‍👧🇩🇪", "a\nb\t c  ", "\x00\x7f", "Ω≈ç√∫˜µ≤≥÷"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bytes")
    write_random_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def trained_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with merges, its mask among the ordinary vocabulary and a non-special added token."""
    path = tmp_path_factory.mktemp("trained")
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    specials = [AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>", "<|mask|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator([" ".join(SAMPLES) * 5, "the quick brown fox " * 20, "mask |mask|> <|mask" * 20], trainer)
    fast.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    fast.enable_truncation(4)
    fast.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


@pytest.fixture(scope="module")
def trained(trained_file: Path) -> Tokenizer:
    return Tokenizer(trained_file.parent, mask_token_id=2)


@pytest.mark.parametrize("text", SAMPLES)
def test_round_trip(tokenizer: Tokenizer, trained: Tokenizer, text: str) -> None:
    for member in (tokenizer, trained):
        assert member.decode(member.encode(text)) == text
    assert tokenizer.encode(text) == list(text.encode())


def test_chat_specials_in_plain_text_are_special(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [IM_START, ord("a"), IM_END]
    assert tokenizer.decode([IM_START, ord("a"), IM_END]) == "a"
    assert tokenizer.decode([IM_START, ord("a"), IM_END], skip_special_tokens=False) == "<|im_start|>a<|im_end|>"


def test_text_of_the_mask_stays_text(tokenizer: Tokenizer, trained: Tokenizer) -> None:
    for member, text, mask in ((tokenizer, "<|MASK|>", MASK), (trained, "<|mask|>", 2)):
        assert member.token_text(mask) == text
        for prompt in (text, f"a{text}b", f"<|im_start|>{text}{text}<|im_end|>", f"日{text}🙂"):
            ids = member.encode(prompt)
            assert mask not in ids
            assert member.decode(ids, skip_special_tokens=False) == prompt
    assert trained.decode([2]) == ""


def test_mask_comes_from_config_or_argument(folder: Path, tmp_path: Path) -> None:
    assert Tokenizer(folder).mask_token_id == MASK
    assert Tokenizer(folder, mask_token_id=IM_END).mask_token_id == IM_END
    assert IM_END not in Tokenizer(folder, mask_token_id=IM_END).encode("<|im_end|>")
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    assert Tokenizer(tmp_path).mask_token_id is None
    (tmp_path / "config.json").write_text('{"architectures": ["SDARForCausalLM"]}')
    with pytest.raises(CheckpointError, match="found 260 tokens, and none has the mask's id 151669; allowed: "):
        Tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="the mask id 65 is an ordinary piece of text"):
        Tokenizer(tmp_path, mask_token_id=65)


def test_vocabulary(tokenizer: Tokenizer, trained: Tokenizer) -> None:
    assert tokenizer.vocab_size == 260
    assert trained.encode("<think>") == [trained.vocab_size - 1]
    assert tokenizer.eos_token_id == IM_END
    assert trained.eos_token_id is None
    assert tokenizer.decode([300, 99999, -1]) == ""
    assert tokenizer.token_text(0xE9) == "\ufffd"
    assert trained.decode(trained.encode("<think>")) == "<think>"


def test_hiding_the_mask_moves_no_other_id(trained: Tokenizer, trained_file: Path) -> None:
    fast = FastTokenizer.from_file(str(trained_file))
    fast.no_truncation()
    text = "".join(SAMPLES) + "<|im_start|><think><|im_end|> the quick brown fox"
    assert trained.encode(text) == fast.encode(text).ids
    assert trained.vocab_size == fast.get_vocab_size()


def test_contradictory_ids_are_refused(trained_file: Path, tmp_path: Path) -> None:
    data = json.loads(trained_file.read_text())
    data["added_tokens"][-1]["id"] += 7
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="added_tokens: '<think>' has id"):
        Tokenizer(tmp_path)


def test_truncation_in_the_file_is_not_applied(trained: Tokenizer) -> None:
    assert len(trained.encode("the quick brown fox " * 10)) > 4


def test_alphabet_is_that_of_the_library() -> None:
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert fast.pre_tokenize_str("é ")[0][0] == "".join(byte_alphabet()[b] for b in "é ".encode())


def test_decode_equals_the_library(tokenizer: Tokenizer, folder: Path) -> None:
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(260) for _ in range(rng.randrange(40))]
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == fast.decode(ids, skip_special_tokens=skip)


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="without lone surrogates"):
        tokenizer.encode("a\ud800")


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 319), max_size=60), cuts=st.lists(st.integers(0, 60)), skip=st.booleans())
def test_pushes_and_flush_equal_decode(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    edges = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    parts = [detokenizer.push(ids[a:b]) for a, b in pairwise(edges)]
    assert "".join(parts) + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_text_in_single_tokens_is_never_broken(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    so_far = ""
    for token in text.encode():
        so_far += detokenizer.push([token])
        assert text.startswith(so_far)
    assert so_far == text
    assert detokenizer.flush() == ""


def test_half_an_emoji_is_held_back_and_flushed(tokenizer: Tokenizer) -> None:
    first, second = list("🙂".encode())[:2], list("🙂".encode())[2:]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([ord("a"), *first]) == "a"
    assert detokenizer.push([IM_END, *second]) == "🙂"
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push([ord("b")]) == "b"


MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hé"}]


def test_chat_template(tokenizer: Tokenizer) -> None:
    head = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhé<|im_end|>\n"
    assert tokenizer.apply_chat_template(MESSAGES) == head + "<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False) == head


def with_template(source: Path, target: Path, template: object) -> Tokenizer:
    (target / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    settings = {"chat_template": template, "eos_token": {"content": "<|im_end|>"}}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(target)


def test_chat_template_sources(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ eos_token }}{{ mood }}"}]
    tokenizer = with_template(folder, tmp_path, named)
    assert tokenizer.eos_token_id == IM_END
    assert tokenizer.apply_chat_template(MESSAGES, mood="happy") == "<|im_end|>happy"
    (tmp_path / "chat_template.jinja").write_text(
        "{{ messages | tojson }}{% for m in messages %}{% break %}{% endfor %}"
    )
    assert Tokenizer(tmp_path).apply_chat_template(MESSAGES) == json.dumps(MESSAGES, ensure_ascii=False)


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0] + 1 }}", "unsupported operand"),
        ("{{ missing.field }}", "undefined"),
        ("{% if %}", "chat template is broken"),
    ],
)
def test_chat_templates_that_cannot_render(folder: Path, tmp_path: Path, template: object, answer: str) -> None:
    with pytest.raises(InvalidRequest, match=answer):
        with_template(folder, tmp_path, template).apply_chat_template(MESSAGES)


def test_other_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    with pytest.raises(CheckpointError, match=r"tokenizer.json: cannot be read"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "decoder": {"type": "Metaspace"}}))
    with pytest.raises(CheckpointError, match="decoder: found Metaspace, allowed: ByteLevel"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "model": {"type": "Nonsense"}}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Tokenizer(tmp_path)


def test_loads_no_torch() -> None:
    code = "import sys, losa_runtime.tokenizer, losa_runtime.models.locate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

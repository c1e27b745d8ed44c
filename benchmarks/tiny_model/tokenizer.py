"""Trains the model's own tokenizer: a small byte-level BPE that splits digits one by one.

Byte-level, so any text can be encoded; trained on the synthetic corpus, so its words become single tokens. Digits are
never merged: an answer is copied digit by digit and each digit has one token only.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.tiny_model import corpus

ENDOFTEXT, IM_START, IM_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"
SPECIALS = (ENDOFTEXT, IM_START, IM_END, MASK)  # ids 0, 1, 2, 3
VOCAB_SIZE = 2048
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+|[^\S\n]+"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def sample_texts(count: int = 1500, seed: int = 7):
    """Documents and prompts that show the trainer every word of the language many times."""
    rng = random.Random(seed)
    for _ in range(count):
        plan = corpus.FactPlan(codes=12, vaults=4, groups=3)
        document = corpus.make_document(rng, 700, plan)
        yield document.text
        for question in document.questions:
            yield f"user\n{question.text}\nassistant\n"
            yield f"system\nYou are a helpful assistant.\n\nQuestion: {question.text}\nAnswer: "


def train() -> Tokenizer:
    """Train the tokenizer; deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the settings Hugging Face tools look for."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32768,
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": ENDOFTEXT,
        "mask_token": MASK,
        "additional_special_tokens": [IM_START, IM_END],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load(folder: Path) -> Tokenizer:
    """The trained tokenizer of a checkpoint folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    target = Path(__file__).parent / "runs" / "tokenizer"  # never over the tokenizer that trained weights depend on
    save(train(), target)
    print(f"wrote {target}")

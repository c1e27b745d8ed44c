"""Log-probabilities in OpenAI's two shapes. What they are is said at `Request.output_logprobs`.

Each token shows as it is decoded alone; part of a character as U+FFFD (chat completions also give its bytes).
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from losa_runtime.core.request import Alternatives
from losa_server.request_manager import TokenizerFace

Json = dict[str, Any]


class TextLogprobs:
    """The shape of /v1/completions, for one choice from its first token on. top: how many likeliest are shown."""

    def __init__(self, tokenizer: TokenizerFace, top: int) -> None:
        self._tokenizer, self._top = tokenizer, top
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def of(self, ids: Sequence[int], values: Sequence[float | None], others: Sequence[Alternatives | None]) -> Json:
        """The next tokens, null where there is no value. text_offset: characters of the whole text (special tokens
        included) before each."""
        texts = [self._tokenizer.token_text(i) for i in ids]
        offsets = []
        for piece in self._tokenizer.pieces(ids, skip_special_tokens=False):
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(piece))
        tops = [self._row(*entry) for entry in zip(texts, values, others, strict=True)] if self._top else None
        return {"tokens": texts, "token_logprobs": list(values), "top_logprobs": tops, "text_offset": offsets}

    def _row(self, text: str, value: float | None, others: Alternatives | None) -> dict[str, float] | None:
        """The likeliest and the token itself; of several that look alike the likeliest."""
        if value is None or others is None:
            return None
        row: dict[str, float] = {}
        for token, logprob in zip(others.top_ids, others.top_logprobs, strict=True):
            row.setdefault(self._tokenizer.token_text(token), logprob)
        row.setdefault(text, value)
        return row


def chat_logprobs(
    tokenizer: TokenizerFace, ids: Sequence[int], values: Sequence[float], others: Sequence[Alternatives]
) -> Json:
    """The shape of /v1/chat/completions. others: one for each token, or none at all."""
    content = [_entry(tokenizer, token, value) for token, value in zip(ids, values, strict=True)]
    for i, entry in enumerate(content):
        tops = zip(others[i].top_ids, others[i].top_logprobs, strict=True) if others else ()
        entry["top_logprobs"] = [_entry(tokenizer, token, value) for token, value in tops]
    return {"content": content, "refusal": None}


def _entry(tokenizer: TokenizerFace, token: int, value: float) -> Json:
    [piece] = tokenizer.pieces((token,), skip_special_tokens=False)
    return {"token": tokenizer.token_text(token), "logprob": value, "bytes": list(piece)}

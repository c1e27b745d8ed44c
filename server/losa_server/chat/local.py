"""A model in this process as partner. Importing this loads torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from losa_runtime.chat_template import PLAIN_TEMPLATE, ChatTemplate
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.llm import LLM
from losa_server.chat.partner import Message, NoAnswer
from losa_server.chat.settings import ChatSettings
from losa_server.rendering.process import render


class LocalPartner:
    """See Partner. Raises ConfigError, CheckpointError or InvalidRequest."""

    def __init__(self, config: EngineConfig, settings: ChatSettings) -> None:
        self._params = SamplingParams.parse(settings.model_dump(exclude={"system"}))
        self._llm = LLM(**config.model_dump(exclude_unset=True))
        tokenizer = self._llm.tokenizer
        self._template = ChatTemplate(tokenizer.chat_template or PLAIN_TEMPLATE, tokenizer.named_specials)
        self.name = config.model
        self.cost: dict[str, Any] = {}

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """See Partner."""
        self.cost = {}
        try:
            for news in self._llm.stream(self._tokens(messages), self._params):
                if news.finish is not None:
                    self._note(news)
                if news.text:
                    yield news.text
        except InvalidRequest as error:
            raise NoAnswer(str(error)) from None
        if self.cost.get("ended_by") == "error":
            raise NoAnswer(str(self.cost["message"]))

    def _tokens(self, messages: Sequence[Message]) -> list[int]:
        tokenizer = self._llm.tokenizer
        pieces = render(self._template, list(tokenizer.special_texts), {"messages": list(messages)})
        return [token for piece in pieces for token in tokenizer.encode(piece)]

    def _note(self, news: Any) -> None:
        self.cost = {
            **news.stats.model_dump(),
            "prompt_tokens": news.prompt_tokens,
            "cached_tokens": news.cached_tokens,
            "completion_tokens": news.completion_tokens,
            "ended_by": news.finish.type,
            "message": news.finish.message,
        }

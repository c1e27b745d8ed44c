"""Who answers in a chat, and what an answer has cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from losa_runtime.core.errors import LosaError

Message = dict[str, str]


class NoAnswer(LosaError):
    """The partner could not answer; the message says why. The conversation may go on."""


class Partner(Protocol):
    """name: of the model. cost: meta_info of the last answer, empty before its end."""

    name: str
    cost: dict[str, Any]

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """The pieces of an answer as they become final. Raises NoAnswer. Closing the iterator ends the work on it."""
        ...

"""What all of OpenAI's answers share: usage, why a choice has ended, and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from losa_server.http.native_answer import meta_info
from losa_server.http.openai.call import Call
from losa_server.request_manager import Generation

Json = dict[str, Any]


def usage(generations: Sequence[Generation], n: int) -> Json:
    """Tokens of a call. A prompt counts once, however many samples were drawn for it."""
    firsts = [generation.answer for generation in generations[::n]]
    prompt = sum(len(generation.prompt_ids) for generation in generations[::n])
    completion = sum(generation.answer.completion_tokens for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in firsts)},
    }


def ending(generation: Generation) -> Json:
    """`finish_reason` and SGLang's `matched_stop`, both null while the choice goes on."""
    finish = generation.answer.finish
    if finish is None:
        return {"finish_reason": None, "matched_stop": None}
    return {"finish_reason": finish.type, "matched_stop": finish.matched}


def extras(call: Call, generation: Generation) -> Json:
    """What a finished choice carries if the client asked for it."""
    more: Json = {"meta_info": meta_info(generation)} if call.with_meta else {}
    return {**more, "prompt_token_ids": list(generation.prompt_ids)} if call.with_prompt_ids else more


def envelope(call: Call, created: int, kind: str, choices: list[Json]) -> Json:
    """The object around choices."""
    return {"id": call.id, "object": kind, "created": created, "model": call.model, "choices": choices}


class Choices(Protocol):
    """The shape of a choice while it grows."""

    def delta(self, index: int, generation: Generation) -> Iterator[Json]:
        """Choices, each of one chunk, that bring what is new; the last one of a finished generation says why."""


class Chunks:
    """An EventMaker: chunks with one choice each, and in the end one with the usage, if that was asked for."""

    def __init__(
        self, call: Call, created: int, kind: str, generations: Sequence[Generation], choices: Choices
    ) -> None:
        self._call, self._created, self._kind = call, created, kind
        self._generations, self._choices = generations, choices

    def news(self, index: int, generation: Generation) -> Iterator[Json]:
        """See EventMaker."""
        for choice in self._choices.delta(index, generation):
            chunk = envelope(self._call, self._created, self._kind, [choice])
            if self._call.usage_always:
                chunk["usage"] = usage(self._generations, self._call.n)
            elif self._call.usage_chunk:
                chunk["usage"] = None
            yield chunk

    def end(self) -> Iterator[Json]:
        """See EventMaker."""
        if self._call.usage_chunk:
            chunk = envelope(self._call, self._created, self._kind, [])
            yield {**chunk, "usage": usage(self._generations, self._call.n)}

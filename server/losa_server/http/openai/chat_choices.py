"""Choices of a chat completion: whole messages, or the deltas of a stream. Tool calls are found in the text."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence

from losa_server.http.openai.answer import Json, ending, extras
from losa_server.http.openai.call import Call
from losa_server.http.openai.logprobs import chat_logprobs
from losa_server.http.openai.tool_calls import Call as ToolCall
from losa_server.http.openai.tool_calls import ToolCallScanner
from losa_server.request_manager import Generation, TokenizerFace


def message_choice(
    tokenizer: TokenizerFace, call: Call, tools: Sequence[str], index: int, generation: Generation
) -> Json:
    """A finished choice. tools: names that may be called; without any, the text is not searched."""
    message: Json = {"role": "assistant", "content": generation.answer.text}
    end = ending(generation)
    if tools:
        scanner = ToolCallScanner(tools)
        pieces = [*scanner.push(generation.answer.text), *scanner.finish()]
        calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
        if calls:
            text = "".join(piece for piece in pieces if isinstance(piece, str))
            message = {"role": "assistant", "content": text or None, "tool_calls": [_shape(c) for c in calls]}
        end = _with_calls(end, len(calls))
    lines = _logprobs(tokenizer, call, generation, 0)
    return {"index": index, "message": message, "logprobs": lines, **end, **extras(call, generation)}


class MessageChoices:
    """Deltas; see Choices. The first one of each choice names the role."""

    def __init__(self, tokenizer: TokenizerFace, call: Call, tools: Sequence[str]) -> None:
        self._tokenizer, self._call, self._tools = tokenizer, call, tools
        self._growing: dict[int, _Growing] = {}

    def delta(self, index: int, generation: Generation) -> Iterator[Json]:
        """See Choices."""
        if index not in self._growing:
            self._growing[index] = _Growing(ToolCallScanner(self._tools) if self._tools else None)
            yield self._choice(index, {"role": "assistant", "content": ""})
        state = self._growing[index]
        for delta in state.deltas(generation):
            yield self._choice(index, delta, state.logprobs(self._tokenizer, self._call, generation))
        if generation.finished:
            lines = state.logprobs(self._tokenizer, self._call, generation)
            end = _with_calls(ending(generation), state.calls)
            yield {**self._choice(index, {}, lines), **end, **extras(self._call, generation)}

    def _choice(self, index: int, delta: Json, logprobs: Json | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None, "matched_stop": None}


class _Growing:
    """How much of one choice the client has."""

    def __init__(self, scanner: ToolCallScanner | None) -> None:
        self._scanner = scanner
        self._chars = self._tokens = self.calls = 0

    def deltas(self, generation: Generation) -> Iterator[Json]:
        text = generation.answer.text[self._chars :]
        self._chars += len(text)
        pieces: list[str | ToolCall] = [text] if text else []
        if self._scanner is not None:
            pieces = self._scanner.push(text) + (self._scanner.finish() if generation.finished else [])
        for piece in pieces:
            if isinstance(piece, str):
                yield {"content": piece}
            else:
                yield {"tool_calls": [{"index": self.calls, **_shape(piece)}]}
                self.calls += 1

    def logprobs(self, tokenizer: TokenizerFace, call: Call, generation: Generation) -> Json | None:
        """Of the tokens since the last time; null if there are none."""
        start, self._tokens = self._tokens, len(generation.answer.token_ids)
        return _logprobs(tokenizer, call, generation, start) if start < self._tokens else None


def _logprobs(tokenizer: TokenizerFace, call: Call, generation: Generation, start: int) -> Json | None:
    if call.logprobs is None:
        return None
    answer = generation.answer
    values, others = answer.output_logprobs[start:], answer.output_alternatives[start:]
    return chat_logprobs(tokenizer, answer.token_ids[start:], values, others)


def _shape(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _with_calls(end: Json, calls: int) -> Json:
    return {**end, "finish_reason": "tool_calls"} if calls and end["finish_reason"] == "stop" else end

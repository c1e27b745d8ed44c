"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from losa_runtime.core.errors import InvalidRequest, LosaError
from losa_runtime.core.request import Alternatives
from losa_server.errors import ClientGone
from losa_server.http.body import read_object, unless_disconnected
from losa_server.http.fields import flag
from losa_server.http.openai.answer import Chunks, Json, ending, envelope, extras, usage
from losa_server.http.openai.call import Call, make_call, top_logprobs
from losa_server.http.openai.logprobs import TextLogprobs
from losa_server.http.openai.wishes import ParsedWishes, parse_body
from losa_server.http.replies import json_reply
from losa_server.http.streaming import manager_of, stream_events, visit_of
from losa_server.request_manager import Generation, RequestManager, TokenizerFace

router = APIRouter()

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Continue one text or several. Streams chunks when `stream` is true."""
    manager = manager_of(request)
    call, echo = parse_completion(manager, await read_object(request))
    created = int(time.time())
    if call.stream:

        def make(generations: Sequence[Generation]) -> Chunks:
            choices = TextChoices(manager.tokenizer, call, echo)
            return Chunks(call, created, "text_completion", generations, choices)

        return await stream_events(request, call.asks, make, call.words.explain)
    try:
        generations = await unless_disconnected(request, manager.generate(call.asks, visit_of(request)))
    except ClientGone:
        raise
    except LosaError as error:
        raise call.words.explain(error) from None
    choices = TextChoices(manager.tokenizer, call, echo)
    made = [choice for i, generation in enumerate(generations) for choice in choices.delta(i, generation)]
    answer = envelope(call, created, "text_completion", made)
    return json_reply({**answer, "usage": usage(generations, call.n)})


def parse_completion(manager: RequestManager, body: Json) -> tuple[Call, bool]:
    """(the call, whether to echo the prompts). Raises RequestFailed or InvalidRequest naming the field."""
    wishes = parse_body(body, ("max_tokens", "max_completion_tokens"), DEFAULT_MAX_TOKENS)
    echo = flag(body, "echo")
    logprobs = None if body.get("logprobs") is None else top_logprobs(body, "logprobs")
    _check_best_of(body, wishes)
    if echo and logprobs is not None and flag(body, "stream"):
        raise InvalidRequest("stream", True, "false with `echo` and `logprobs` (those of the prompt come at the end)")
    prompts = _prompts(body.get("prompt"))
    scored = echo and logprobs is not None
    return make_call(manager, body, prompts, wishes, "cmpl", logprobs, scored), echo


def _check_best_of(body: Json, wishes: ParsedWishes) -> None:
    best = body.get("best_of")
    if best is not None and (type(best) is not int or best != wishes.n):
        raise InvalidRequest("best_of", best, f"{wishes.n}, which is n (samples are not ranked)")


def _prompts(given: Any) -> list[tuple[str, str | tuple[int, ...]]]:
    """Each prompt with its name."""
    if isinstance(given, str):
        return [("prompt", given)]
    if isinstance(given, list) and given:
        if all(type(i) is int for i in given):
            return [("prompt", tuple(given))]
        if all(isinstance(text, str) for text in given):
            return [(f"prompt.{i}", text) for i, text in enumerate(given)]
        if all(isinstance(ids, list) and ids and all(type(i) is int for i in ids) for ids in given):
            return [(f"prompt.{i}", tuple(ids)) for i, ids in enumerate(given)]
    raise InvalidRequest("prompt", given, "a string, token ids, or a non-empty list of either")


class TextChoices:
    """Choices of a text completion; see Choices. echo: the prompt's text comes first."""

    def __init__(self, tokenizer: TokenizerFace, call: Call, echo: bool) -> None:
        self._tokenizer, self._call, self._echo = tokenizer, call, echo
        self._sent: dict[int, tuple[int, int]] = {}  # index -> characters and tokens that the client has
        self._logprobs: dict[int, TextLogprobs] = {}

    def delta(self, index: int, generation: Generation) -> Iterator[Json]:
        """See Choices."""
        answer, first = generation.answer, index not in self._sent
        chars, tokens = self._sent.get(index, (0, 0))
        self._sent[index] = (len(answer.text), len(answer.token_ids))
        text = answer.text[chars:]
        if first and self._echo:
            text = self._prompt(generation) + text
        lines = self._lines(index, generation, tokens)
        if text or lines or generation.finished:
            choice = {"index": index, "text": text, "logprobs": lines, **ending(generation)}
            yield {**choice, **extras(self._call, generation)} if generation.finished else choice

    def _prompt(self, generation: Generation) -> str:
        prompt = generation.ask.prompt
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, skip_special_tokens=False)

    def _lines(self, index: int, generation: Generation, start: int) -> Json | None:
        answer = generation.answer
        ids: list[int] = answer.token_ids[start:]
        if self._call.logprobs is None or not (ids or generation.finished):
            return None
        lines = self._logprobs.setdefault(index, TextLogprobs(self._tokenizer, self._call.logprobs))
        values: list[float | None] = [*answer.output_logprobs[start:]]
        others: list[Alternatives | None] = [*answer.output_alternatives[start:]]
        if self._echo:  # not in a stream, so this is all there is
            ids = [*generation.prompt_ids[: len(answer.prompt_logprobs)], *ids]
            values, others = [*answer.prompt_logprobs, *values], [*answer.prompt_alternatives, *others]
        return lines.of(ids, values, others)

"""From prompts to answers: tokenizes, names each request, sends it to the engine, gathers or streams what comes back.

Lives in the event loop of the HTTP process. Knows neither HTTP bodies nor the engine's inside. Whoever opens a
Generation closes it (`close_all`), in a `finally`: closing an unfinished one is how the engine learns that its client
has left.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.request import Request, ScoreSpec
from losa_runtime.core.sampling_params import SamplingParams
from losa_server.answer import Answer
from losa_server.compiling import Compiling
from losa_server.engine_client import EngineClient
from losa_server.errors import RequestFailed
from losa_server.mailbox import Mailbox
from losa_server.settings import ServerSettings
from losa_server.visit import Visit

# Text with more characters per token of context than this fits only if it is mostly blanks or repetition.
CHARS_PER_TOKEN = 16


class TokenizerFace(Protocol):
    """What the HTTP process needs of a tokenizer; `losa_runtime.tokenizer.Tokenizer` has it."""

    vocab_size: int
    chat_template: str | None
    named_specials: dict[str, str]
    special_texts: tuple[str, ...]

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_text(self, token_id: int) -> str: ...
    def pieces(self, ids: Sequence[int], skip_special_tokens: bool = True) -> list[bytes]: ...


@dataclass(frozen=True)
class Ask:
    """One prompt with everything that is wanted of it.

    prompt: text or token ids; field: what the client called it, with its index in a list. label: the client's name for
    the request (need not be unique). score_start: first prompt position whose log-probability is wanted, None for none.
    top_logprobs, logprob_ids, trace: see Request.
    """

    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    field: str = "text"
    label: str | None = None
    score_start: int | None = None
    output_logprobs: bool = False
    top_logprobs: int = 0
    logprob_ids: tuple[int, ...] = ()
    trace: bool = False
    namespace: str = ""
    priority: int = 0


class Watcher(Protocol):
    """Somebody who counts. Called in the event loop; must not wait and must not raise."""

    def advanced(self, generation: Generation, tokens: int, gap_s: float) -> None:
        """New tokens (or none, but other news), and the seconds since the news before, or since the start."""

    def closed(self, generation: Generation) -> None:
        """The end, whatever it is; see Generation.outcome."""


class Generation:
    """One request on its way. `answer` is what has come so far; call `advance` for more and `close` in the end.

    seconds: from start to finish; first_s: to the first tokens. None before.
    """

    def __init__(
        self,
        ask: Ask,
        visit: Visit,
        request: Request,
        mailbox: Mailbox,
        client: EngineClient,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self.ask, self.visit, self.prompt_ids, self.rid = ask, visit, request.prompt_ids, request.rid
        self.label = ask.label or self.rid
        self.answer = Answer()
        self.started = time.monotonic()
        self.seconds: float | None = None
        self.first_s: float | None = None
        self.failure: RequestFailed | None = None
        self._mailbox, self._client, self._watchers = mailbox, client, watchers
        self._last_news = self.started

    @property
    def finished(self) -> bool:
        """True when the answer is complete."""
        return self.answer.finish is not None

    @property
    def outcome(self) -> str:
        """How it ended: stop, length, abort or error as the engine says; refused; or left, while it went on."""
        if self.answer.finish is not None:
            return self.answer.finish.type
        if self.failure is None:
            return "left"
        return "error" if self.failure.status_code == 500 else "refused"

    async def advance(self) -> None:
        """Wait for news and add all of them to the answer. Raises RequestFailed."""
        try:
            news = await self._mailbox.take()
        except RequestFailed as error:
            self.failure = self._in_the_clients_words(error)
            raise self.failure from None
        tokens = -self.answer.completion_tokens
        self.answer.add(news)
        self._note(tokens + self.answer.completion_tokens)
        finish = self.answer.finish
        if finish is not None:
            self.seconds = time.monotonic() - self.started
            if finish.type == "error":
                raise RequestFailed(finish.status_code or 500, finish.message or "the request failed in the engine")

    def close(self) -> None:
        """Forget the request and, if it goes on, have it aborted. Called once; never waits."""
        self._client.release(self.rid, self.finished)
        answer, stats = self.answer, self.answer.stats
        self.visit.tally.add(
            self.outcome,
            self.first_s,
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            completion_tokens=answer.completion_tokens,
            forwards=stats.forwards,
            blocks=stats.blocks,
            denoise_steps=stats.denoise_steps,
            kv_bytes=stats.kv_bytes,
            dense_bytes=stats.dense_bytes,
        )
        for watcher in self._watchers:
            watcher.closed(self)

    def _note(self, tokens: int) -> None:
        now = time.monotonic()
        gap_s, self._last_news = now - self._last_news, now
        if tokens and self.first_s is None:
            self.first_s = now - self.started
        for watcher in self._watchers:
            watcher.advanced(self, tokens, gap_s)

    def _in_the_clients_words(self, error: RequestFailed) -> RequestFailed:
        """The engine says `prompt` or `input_ids`; the client said e.g. `text` or, in a list, `input_ids.3`."""
        field = error.field or ""
        head, dot, rest = field.partition(".")
        if head in ("prompt", "input_ids"):
            theirs = self.ask.field + dot + rest
        elif head == "custom_params":
            theirs = f"sampling_params.{field}"
        else:
            return error
        return RequestFailed(error.status_code, error.message.replace(field, theirs, 1), theirs)


class RequestManager:
    """Everything an HTTP route needs: generate, stream, abort, ask the engine. One per server.

    tokenizer: must give the same ids as the engine's. Its `encode` is called from worker threads for long texts.
    """

    def __init__(self, client: EngineClient, tokenizer: TokenizerFace, settings: ServerSettings) -> None:
        self.client, self.tokenizer, self.settings = client, tokenizer, settings
        self.created = int(time.time())
        self.watchers: list[Watcher] = []
        self._live: dict[str, Generation] = {}
        self.compiling = Compiling()

    @property
    def info(self) -> dict[str, Any]:
        """The engine's facts (`Engine.info`)."""
        return self.client.info

    @property
    def longest_text(self) -> int:
        """Characters of the longest text that is tokenized: as set, else a generous multiple of the context."""
        context = self.info.get("context_length")
        return self.settings.max_prompt_chars or CHARS_PER_TOKEN * (context if isinstance(context, int) else 2**20)

    async def encode(self, text: str | Sequence[str], field: str = "text") -> list[int]:
        """Token ids of a text, or of pieces that are not to be tokenized across their borders; long ones in a thread,
        so that other clients are not kept waiting.

        Raises InvalidRequest about `field` for a text that is too long to be worth the work.
        """
        pieces = (text,) if isinstance(text, str) else text
        size, limit = sum(map(len, pieces)), self.longest_text
        if size > limit:
            raise InvalidRequest(field, f"{size} characters", f"at most {limit} (--max-prompt-chars)")
        if size < self.settings.long_text:
            return self._encode(pieces)
        return await asyncio.to_thread(self._encode, pieces)

    def _encode(self, pieces: Sequence[str]) -> list[int]:
        return [token for piece in pieces for token in self.tokenizer.encode(piece)]

    async def open_all(self, asks: Sequence[Ask], visit: Visit) -> list[Generation]:
        """Send requests, all or none; whoever calls closes them. Raises RequestFailed or InvalidRequest."""
        self.client.require_room(len(asks))
        known: dict[str, tuple[int, ...]] = {}  # samples share their prompt
        for ask in asks:
            if isinstance(ask.prompt, str) and ask.prompt not in known:
                known[ask.prompt] = tuple(await self.encode(ask.prompt, ask.field))
        ids = [known[ask.prompt] if isinstance(ask.prompt, str) else ask.prompt for ask in asks]
        self._check_sizes(asks, ids)
        compiled = [await self.compiling.automaton(ask.sampling) for ask in asks]
        requests = [_request(*each, visit) for each in zip(asks, ids, compiled, strict=True)]
        mailboxes = self.client.submit(requests)
        generations = [
            Generation(ask, visit, request, mailbox, self.client, self.watchers)
            for ask, request, mailbox in zip(asks, requests, mailboxes, strict=True)
        ]
        self._live |= {generation.rid: generation for generation in generations}
        return generations

    def _check_sizes(self, asks: Sequence[Ask], ids: Sequence[tuple[int, ...]]) -> None:
        """Refuse what is too much before anything is sent. Raises InvalidRequest."""
        context, scored = self.info.get("context_length"), 0
        for ask, prompt_ids in zip(asks, ids, strict=True):
            if isinstance(context, int) and len(prompt_ids) > context:  # the engine would say so, too, but later
                raise InvalidRequest(ask.field, f"{len(prompt_ids)} tokens", f"at most the context of {context} tokens")
            scored += 0 if ask.score_start is None else max(0, len(prompt_ids) - ask.score_start)
        limit = self.settings.max_score_tokens
        if scored > limit:
            allowed = f"a start that leaves at most {limit} in one call (--max-score-tokens)"
            raise InvalidRequest("logprob_start_len", f"{scored} prompt tokens to score", allowed)

    def close_all(self, generations: Sequence[Generation]) -> None:
        """Close; see Generation.close. Idempotent."""
        for generation in generations:
            if self._live.pop(generation.rid, None) is not None:
                generation.close()

    async def generate(self, asks: Sequence[Ask], visit: Visit) -> list[Generation]:
        """Complete several prompts; finished generations in the order of `asks`.

        Raises RequestFailed of the first that fails; the others are then aborted. Cancelling aborts all.
        """
        generations = await self.open_all(asks, visit)
        try:
            async for _ in self.stream(generations):
                pass
        finally:
            self.close_all(generations)
        return generations

    async def stream(self, generations: Sequence[Generation]) -> AsyncIterator[Generation]:
        """Yield a generation each time it has news, until all have finished. Raises RequestFailed. Closes nothing."""
        waiting = {asyncio.create_task(g.advance()): g for g in generations}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # a failure ends the whole call, before any news of the same moment
                for task in done:
                    generation = waiting.pop(task)
                    if not generation.finished:
                        waiting[asyncio.create_task(generation.advance())] = generation
                    yield generation
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)  # or asyncio logs their errors as unseen

    def abort(self, label: str, visit: Visit) -> int:
        """Abort live requests whose label starts with `label`; how many. Their waiters get what there is so far.

        An administrator reaches all requests, anybody else those of the same name.
        """
        who = visit.caller
        mine = (g for g in self._live.values() if who.admin or g.visit.caller.name == who.name)
        found = [g for g in mine if g.label.startswith(label)]
        for generation in found:
            self.client.abort(generation.rid)
        return len(found)

    @property
    def live(self) -> int:
        """Requests that somebody waits for."""
        return len(self._live)


def _request(ask: Ask, prompt_ids: tuple[int, ...], compiled: bytes | None, visit: Visit) -> Request:
    """What the engine is asked. Its name is ours alone: clients may choose equal labels, or another's."""
    return Request(
        rid=uuid.uuid4().hex,
        prompt_ids=prompt_ids,
        sampling=ask.sampling,
        score=None if ask.score_start is None else ScoreSpec(start=ask.score_start),
        output_logprobs=ask.output_logprobs,
        top_logprobs=ask.top_logprobs,
        logprob_ids=ask.logprob_ids,
        trace=ask.trace,
        compiled=compiled,
        namespace=visit.caller.namespace(ask.namespace),
        priority=ask.priority,
    )

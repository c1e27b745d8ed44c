"""The offline face: prompts in, completions out, no server. Batches everything it is given."""

from __future__ import annotations

import itertools
import operator
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import InvalidRequest, LosaError, invalid_request
from losa_runtime.core.request import FinishReason, Request, RequestOutput, RequestStats
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.engine import Engine

Prompt = str | Sequence[int]


class Completion(NamedTuple):
    """The finished answer to one prompt. logprobs: of the tokens, when asked for; see RequestStats for stats."""

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason
    prompt_tokens: int
    cached_tokens: int
    stats: RequestStats
    logprobs: tuple[float, ...] | None = None


class LLM:
    """A block-diffusion model in this process.

    model: checkpoint folder or hub id; options: any field of EngineConfig, e.g. sparse_method="losa",
    token_budget=1024. Raises ConfigError or CheckpointError with everything needed to understand it.
    """

    def __init__(self, model: str, **options: Any) -> None:
        options.setdefault("show_progress", False)
        options.setdefault(
            "max_queued_requests", 1 << 30
        )  # nobody else is waiting: the caller holds all prompts anyway
        self.engine = Engine(EngineConfig.parse(model=str(model), **options))
        self.tokenizer = self.engine.parts.tokenizer
        self._names = itertools.count()  # request ids are never used twice

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        logprobs: bool = False,
        show_progress: bool = False,
    ) -> list[Completion]:
        """Complete prompts (texts or token ids), all batched together; the results come in the order of the prompts.

        sampling_params: one for all, or one per prompt. Raises InvalidRequest, naming the prompt, before any work. A
        request that fails in the engine has `finish.type` "error"; the others are not touched by it.
        """
        many = _as_list(prompts)
        params = _per_prompt(sampling_params, len(many))
        requests = [
            self._request(i, prompt, sampling=s, output_logprobs=logprobs)
            for i, (prompt, s) in enumerate(zip(many, params, strict=True))
        ]
        finished = self._run(requests, show_progress)
        return [_completion(finished[r.rid], logprobs) for r in requests]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, piece by piece: news as it becomes final, the last with a `finish`.

        Closing the iterator early ends the request; until its end, nothing else can be asked. Raises InvalidRequest
        before any work.
        """
        request = self._request(0, prompt, sampling=sampling_params or SamplingParams())
        self._require_idle()
        self._add("prompts[0]", request)
        try:
            while self.engine.has_work():
                yield from self._step()
        finally:
            self._abandon([request])

    def score(self, prompts: Prompt | Sequence[Prompt], start: int = 0) -> list[tuple[float | None, ...]]:
        """Log-probabilities of the prompts' tokens from position `start` on (see ScoreSpec for the definition); None
        for the first token of a model with shifted logits.

        Raises InvalidRequest before any work, LosaError if the engine could not score a prompt.
        """
        nothing = SamplingParams(max_new_tokens=0)
        requests = [
            self._request(i, prompt, sampling=nothing, score={"start": start})
            for i, prompt in enumerate(_as_list(prompts))
        ]
        finished = self._run(requests, show_progress=False)
        return [_scores(finished[r.rid][-1]) for r in requests]

    def _request(self, index: int, prompt: Prompt, **fields: Any) -> Request:
        where = f"prompts[{index}]"
        try:
            tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            ids = [operator.index(token) for token in tokens]
        except TypeError:
            raise InvalidRequest(where, prompt, "a text or a sequence of token ids") from None
        try:
            return Request(rid=f"{next(self._names)}", prompt_ids=tuple(ids), **fields)
        except ValidationError as error:
            raise invalid_request(where, error) from None

    def _run(self, requests: Sequence[Request], show_progress: bool) -> dict[str, list[RequestOutput]]:
        """Add all, or none if one is refused; then step until the last has finished. Whatever interrupts this, none of
        them stays behind in the engine."""
        news: dict[str, list[RequestOutput]] = {request.rid: [] for request in requests}
        self._require_idle()
        columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            for i, request in enumerate(requests):
                self._add(f"prompts[{i}]", request)
            with Progress(*columns, disable=not show_progress) as progress:
                bar = progress.add_task("generating", total=len(requests))
                while self.engine.has_work():
                    for output in self._step():
                        news[output.rid].append(output)
                        progress.advance(bar, output.finish is not None)
        finally:
            self._abandon(requests)
        return news

    def _step(self) -> list[RequestOutput]:
        with _between_steps():
            return self.engine.step()

    def _require_idle(self) -> None:
        if self.engine.has_work():
            raise LosaError("a stream of this LLM has not ended; finish or close it first")

    def _abandon(self, requests: Sequence[Request]) -> None:
        """Whatever came between, none of these stays behind in the engine; harmless for those that have ended."""
        for request in requests:
            self.engine.abort(request.rid)
        while self.engine.has_work():  # only endings to be collected: nothing is left to run
            self.engine.step()
        self.engine.rest()

    def _add(self, where: str, request: Request) -> None:
        try:
            self.engine.add(request)
        except InvalidRequest as error:
            raise InvalidRequest(f"{where}.{error.field}", error.found, error.allowed) from None


@contextmanager
def _between_steps() -> Iterator[None]:
    """Hold back Ctrl-C until the end: half a step would leave pages in nobody's hand."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[FrameType | None] = []
    before = signal.signal(signal.SIGINT, lambda _, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(signal.SIGINT, came[0])


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a text and a sequence of integers are one."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        many: list[Any] = list(prompts)
    except TypeError:
        raise InvalidRequest("prompts", prompts, "a text, token ids, or a sequence of either") from None
    one = bool(many) and not isinstance(many[0], str) and not hasattr(many[0], "__len__")
    return [many] if one else many


def _scores(last: RequestOutput) -> tuple[float | None, ...]:
    assert last.finish is not None
    if last.finish.type == "error":
        raise LosaError(f"a prompt could not be scored: {last.finish.message}")
    return last.prompt_logprobs or ()


def _per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequest("sampling_params", f"{len(params)} of them", f"one, or one for each of {count} prompts")
    return list(params)


def _completion(outputs: Sequence[RequestOutput], logprobs: bool) -> Completion:
    last = outputs[-1]
    assert last.finish is not None
    return Completion(
        text="".join(o.text for o in outputs),
        token_ids=tuple(t for o in outputs for t in o.token_ids),
        finish=last.finish,
        prompt_tokens=last.prompt_tokens,
        cached_tokens=last.cached_tokens,
        stats=last.stats,
        logprobs=tuple(p for o in outputs for p in o.output_logprobs or ()) if logprobs else None,
    )

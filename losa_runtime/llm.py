"""The offline face: prompts in, completions out, no server. Batches everything it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import InvalidRequest, LosaError
from losa_runtime.core.request import FinishReason, Request, RequestOutput, RequestStats, ScoreSpec
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

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        logprobs: bool = False,
        show_progress: bool = False,
    ) -> list[Completion]:
        """Complete prompts (texts or token ids), all batched together; the results come in the order of the prompts.

        sampling_params: one for all, or one per prompt. Raises InvalidRequest, naming the prompt, before any work.
        """
        many = _as_list(prompts)
        params = _per_prompt(sampling_params, len(many))
        requests = [
            Request(rid=str(i), prompt_ids=self._ids(p), sampling=s, output_logprobs=logprobs)
            for i, (p, s) in enumerate(zip(many, params, strict=True))
        ]
        finished = self._run(requests, show_progress)
        return [_completion(finished[r.rid], logprobs) for r in requests]

    def score(self, prompts: Prompt | Sequence[Prompt], start: int = 0) -> list[tuple[float, ...]]:
        """Log-probabilities of the prompts' tokens from position `start` on (see ScoreSpec for the definition)."""
        nothing = SamplingParams(max_new_tokens=0)
        requests = [
            Request(rid=str(i), prompt_ids=self._ids(p), sampling=nothing, score=ScoreSpec(start=start))
            for i, p in enumerate(_as_list(prompts))
        ]
        finished = self._run(requests, show_progress=False)
        return [finished[r.rid][-1].prompt_logprobs or () for r in requests]

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)

    def _run(self, requests: Sequence[Request], show_progress: bool) -> dict[str, list[RequestOutput]]:
        """Add all, or none if one is refused; then step until the last has finished."""
        for i, request in enumerate(requests):
            try:
                self.engine.add(request)
            except LosaError as error:
                for other in requests[:i]:
                    self.engine.abort(other.rid)
                while self.engine.has_work():
                    self.engine.step()
                if isinstance(error, InvalidRequest):
                    raise InvalidRequest(f"prompts[{i}].{error.field}", error.found, error.allowed) from None
                raise
        news: dict[str, list[RequestOutput]] = {request.rid: [] for request in requests}
        columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, disable=not show_progress) as progress:
            bar = progress.add_task("generating", total=len(requests))
            while self.engine.has_work():
                for output in self.engine.step():
                    news[output.rid].append(output)
                    progress.advance(bar, output.finish is not None)
        return news


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(prompts)
    return [many] if many and isinstance(many[0], int) else many


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

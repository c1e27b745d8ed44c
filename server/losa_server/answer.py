"""What one prompt has brought so far: the sum of the engine's news. Knows no HTTP and no engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from losa_runtime.core.request import Alternatives, FinishReason, RequestOutput, RequestStats, StepTrace

# Clients drop a log-probability of exactly 0 as "none", so a certain token gets the next best thing.
LARGEST_LOGPROB = -1e-9


@dataclass
class Answer:
    """Grows with every `add`; `finish` is None until the request has ended. Log-probabilities are natural, below 0, or
    None for a prompt's first token that has none.

    trace: denoising steps that nobody has taken out yet (`take_trace`), for a request that asked for them.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    output_alternatives: list[Alternatives] = field(default_factory=list)
    prompt_alternatives: list[Alternatives | None] = field(default_factory=list)
    trace: list[StepTrace] = field(default_factory=list)
    finish: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    stats: RequestStats = field(default_factory=RequestStats)

    def add(self, news: list[RequestOutput]) -> None:
        """Take in news in their order."""
        for output in news:
            self.text += output.text
            self.token_ids.extend(output.token_ids)
            self.output_logprobs.extend(_below_zero(output.output_logprobs))
            self.prompt_logprobs.extend(None if p is None else _capped(p) for p in output.prompt_logprobs or ())
            self.output_alternatives.extend(map(_others_below_zero, output.output_alternatives or ()))
            others = output.prompt_alternatives or ()
            self.prompt_alternatives.extend(None if o is None else _others_below_zero(o) for o in others)
            self.trace.extend(output.trace)
            self.prompt_tokens, self.cached_tokens = output.prompt_tokens, output.cached_tokens
            self.completion_tokens, self.stats = output.completion_tokens, output.stats
            self.finish = output.finish or self.finish

    def take_trace(self) -> list[StepTrace]:
        """The steps since the last call, in order."""
        taken, self.trace = self.trace, []
        return taken


def _below_zero(values: tuple[float, ...] | None) -> tuple[float, ...]:
    return tuple(map(_capped, values or ()))


def _capped(value: float) -> float:
    return min(value, LARGEST_LOGPROB)


def _others_below_zero(others: Alternatives) -> Alternatives:
    return others._replace(top_logprobs=_below_zero(others.top_logprobs), asked=_below_zero(others.asked))

"""What a block's new tokens mean for its request: news for the user, and whether it is the end. Knows no pages."""

from __future__ import annotations

from typing import NamedTuple

from losa_runtime.core.request import Alternatives, FinishReason, RequestOutput, StepTrace
from losa_runtime.scheduler.block import DiffusionBlock
from losa_runtime.scheduler.req import Req


class News(NamedTuple):
    """New final tokens of a request and, if it ended with them, why. trace: the step that brought them, if wanted."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    text: str = ""
    finish: FinishReason | None = None
    alternatives: tuple[Alternatives, ...] = ()
    trace: tuple[StepTrace, ...] = ()


class Step(NamedTuple):
    """What a denoising step means for its block, as far as its tokens tell.

    end: offset behind the final tokens, None while the block goes on. stop_at: offset of the stop token among them, if
    there is one. last: the request ends with this block; if not, its text may still hold a stop string.
    """

    block: DiffusionBlock
    end: int | None = None
    stop_at: int | None = None
    last: bool = False


def judge(req: Req, block: DiffusionBlock) -> Step:
    """Look at a block after a denoising step.

    A block ends early as soon as a stop token stands with nothing masked before it: tokens that are unmasked never
    change, so what lies behind cannot alter what the user sees.
    """
    stop_at = block.first_stop(req.settings.stop_ids)
    if stop_at is not None:
        return Step(block, stop_at + 1, stop_at, last=True)
    if block.complete:
        return Step(block, block.limit, last=block.start + block.limit >= req.settings.limit)
    return Step(block)


def tell(req: Req, step: Step) -> News | None:
    """The news of a step, with its trace if that is wanted; None if there are none. To be called once for each step,
    in order, before the block takes another one."""
    news = None if step.end is None else _deliver(req, step, step.end)
    return traced(req, step.block, news) if req.request.trace else news


def error(message: str, status_code: int = 500) -> FinishReason:
    """The end of a request, as a rule one that is not its own fault."""
    return FinishReason(type="error", message=message, status_code=status_code)


def _deliver(req: Req, step: Step, end: int) -> News:
    block, stop_at = step.block, step.stop_at
    ids = [int(t) for t in block.tokens[block.known : end]]
    logprobs = [float(p) for p in block.logprobs[block.known : end]]
    # A stop token ends the text but is not part of it.
    keep_stop = stop_at is None or req.request.sampling.no_stop_trim
    spoken = ids if keep_stop else ids[:-1]
    text, used, matched = req.settings.text.push(spoken, final=step.last)
    finish: FinishReason | None = None
    if matched is not None:
        ids, logprobs = ids[:used], logprobs[:used]
        finish = FinishReason(type="stop", matched=matched)
    elif stop_at is not None:
        finish = FinishReason(type="stop", matched=ids[-1])
    elif step.last:
        finish = FinishReason(type="length", length=req.completion_tokens + len(ids))
    req.completion_tokens += len(ids)
    offsets = range(block.known, block.known + len(ids)) if req.wants_alternatives else range(0)
    return News(tuple(ids), tuple(logprobs), text, finish, tuple(block.alternatives[o] for o in offsets))


def traced(req: Req, block: DiffusionBlock, news: News | None) -> News:
    """The news with the step that the block has just taken, also where there is no other news."""
    shift = block.start - req.prompt_len
    latest = (0, *block.latest) if block.foretold and block.step <= 1 else block.latest
    step = StepTrace(
        start=block.known + shift,
        stop=block.limit + shift,
        step=max(0, block.step - 1),
        positions=tuple(offset + shift for offset in latest),
        token_ids=tuple(int(block.tokens[offset]) for offset in latest),
        logprobs=tuple(float(block.logprobs[offset]) for offset in latest),
    )
    return (news or News())._replace(trace=(step,))


def to_output(req: Req, news: News) -> RequestOutput:
    """The message for the user."""
    complete = news.finish is not None and news.finish.type in ("stop", "length")
    scores = tuple(req.scores) if complete and req.request.score is not None else None
    others = req.wants_alternatives
    return RequestOutput(
        rid=req.request.rid,
        text=news.text,
        token_ids=news.ids,
        output_logprobs=news.logprobs if req.request.output_logprobs else None,
        prompt_logprobs=scores,
        output_alternatives=news.alternatives if req.request.output_logprobs and others else None,
        prompt_alternatives=tuple(req.score_alternatives) if scores is not None and others else None,
        trace=news.trace,
        finish=news.finish,
        prompt_tokens=req.prompt_len,
        cached_tokens=req.cached_tokens or 0,
        completion_tokens=req.completion_tokens,
        stats=req.cost.stats(),
    )

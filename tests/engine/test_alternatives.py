"""Log-probabilities and step traces that a request may ask for: what they are, and that they change nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from losa_runtime import LLM
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.request import Request, RequestOutput
from losa_runtime.core.sampling_params import DiffusionParams, SamplingParams
from tests.engine import plain_loop

PROMPT = tuple(range(30, 63))  # two blocks and a token
GREEDY = SamplingParams(
    temperature=0.0,
    max_new_tokens=40,
    ignore_eos=True,
    custom_params=DiffusionParams(algorithm="low_confidence_static", denoising_steps=5),
)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return LLM(model=str(tiny_checkpoint), max_total_tokens=4096)


def run(llm: LLM, *requests: Request) -> dict[str, list[RequestOutput]]:
    found: dict[str, list[RequestOutput]] = {request.rid: [] for request in requests}
    for request in requests:
        llm.engine.add(request)
    while llm.engine.has_work():
        for output in llm.engine.step():
            found[output.rid].append(output)
    return found


def ask(rid: str = "r", **wishes: Any) -> Request:
    return Request(**{"rid": rid, "prompt_ids": PROMPT, "sampling": GREEDY, "output_logprobs": True, **wishes})


def test_values_are_those_of_the_accepting_step(llm: LLM) -> None:
    """The plain loop's logits of each step, looked up for the step in which each token was accepted."""
    [outputs] = run(llm, ask(top_logprobs=3, logprob_ids=(65, 9), trace=True)).values()
    ids = [t for o in outputs for t in o.token_ids]
    logprobs = [p for o in outputs for p in o.output_logprobs or ()]
    others = [a for o in outputs for a in o.output_alternatives or ()]
    steps = [step for o in outputs for step in o.trace]
    seen: list[torch.Tensor] = []
    model, eos = llm.engine.parts.runner.model, llm.engine.parts.eos_token_ids
    want = plain_loop.generate(
        model, list(PROMPT), 40, 5, "low_confidence_static", vocab_size=llm.tokenizer.vocab_size,
        stop=(), seen_logits=seen,
    )  # fmt: skip
    assert len(ids) == len(logprobs) == len(others) == 40
    assert ids == want and not set(want) & eos, "the loop knows no ignore_eos"
    assert len(seen) == len(steps)
    masked: dict[int, set[int]] = {}
    for logits, step in zip(seen, steps, strict=True):
        left = masked.setdefault(step.start, set(range(step.start, step.stop)))
        assert len(logits) == len(left)
        logp = logits.double().clone()
        logp[:, llm.tokenizer.vocab_size :] = -math.inf
        logp[:, [llm.engine.parts.model_config.mask_token_id, *eos]] = -math.inf
        logp = logp.log_softmax(-1)
        order = sorted(left)
        for position, token, logprob in zip(step.positions, step.token_ids, step.logprobs, strict=True):
            row = order.index(position)
            assert ids[position] == token
            assert logprobs[position] == logprob == pytest.approx(float(logp[row, token]), abs=1e-3)
            best, best_ids = logp[row].topk(3)
            assert others[position].top_ids == tuple(best_ids.tolist())
            assert others[position].top_logprobs == pytest.approx(best.tolist(), abs=1e-3)
            assert others[position].asked == pytest.approx(logp[row, [65, 9]].tolist(), abs=1e-3)
        left -= set(step.positions)
    assert not any(masked.values())


def test_scores_have_alternatives_too(llm: LLM) -> None:
    scoring = {"sampling": SamplingParams(max_new_tokens=0), "score": {"start": 5}}
    [[last]] = run(llm, ask(top_logprobs=2, logprob_ids=(PROMPT[7],), **scoring)).values()
    assert last.prompt_logprobs is not None and last.prompt_alternatives is not None
    assert len(last.prompt_alternatives) == len(last.prompt_logprobs) == len(PROMPT) - 5
    assert last.prompt_alternatives[2].asked == (pytest.approx(last.prompt_logprobs[2]),)
    for value, other in zip(last.prompt_logprobs, last.prompt_alternatives, strict=True):
        assert other.top_logprobs[0] >= max(value - 1e-9, other.top_logprobs[1])
    [[plain]] = run(llm, ask(**scoring)).values()
    assert plain.prompt_alternatives is None and plain.prompt_logprobs == last.prompt_logprobs


def test_asking_changes_no_neighbour_and_no_token(llm: LLM) -> None:
    llm.engine.flush_cache()
    [alone] = run(llm, ask()).values()
    assert all(o.output_alternatives is None and not o.trace for o in alone)
    together = run(llm, ask("a", top_logprobs=5), ask("b"), ask("c", trace=True, output_logprobs=False))
    ids = {rid: [t for o in outputs for t in o.token_ids] for rid, outputs in together.items()}
    assert ids["a"] == ids["b"] == ids["c"] == [t for o in alone for t in o.token_ids]
    assert all(o.output_alternatives is None and not o.trace for o in together["b"])
    assert all(o.output_logprobs is None for o in together["c"])


def test_a_trace_rebuilds_the_output_and_costs_one_message_per_step(llm: LLM) -> None:
    [outputs] = run(llm, ask(trace=True)).values()
    steps = [step for o in outputs for step in o.trace]
    assert len(outputs) == len(steps) == outputs[-1].stats.denoise_steps
    written: dict[int, int] = {}
    for step in steps:
        assert all(step.start <= p < step.stop for p in step.positions) and step.positions
        written |= dict(zip(step.positions, step.token_ids, strict=True))
    assert [written[i] for i in range(40)] == [t for o in outputs for t in o.token_ids]
    assert steps[0].start == 0 and steps[0].step == 0 and steps[0].stop == 15, "one token of the block is the prompt's"


def test_alternatives_follow_a_stop_in_the_middle_of_a_block(llm: LLM) -> None:
    [outputs] = run(llm, ask(top_logprobs=1)).values()
    ids = [t for o in outputs for t in o.token_ids]
    stop = ids[20]
    params = GREEDY.model_copy(update={"stop_token_ids": (stop,)})
    [cut] = run(llm, ask(sampling=params, top_logprobs=1)).values()
    n = ids.index(stop) + 1
    assert [t for o in cut for t in o.token_ids] == ids[:n]
    assert sum(len(o.output_alternatives or ()) for o in cut) == n == sum(len(o.output_logprobs or ()) for o in cut)


def test_ids_outside_the_vocabulary_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="token_ids_logprob: found 260"):
        llm.engine.add(ask(logprob_ids=(3, 260)))
    assert not llm.engine.has_work()


def test_retracted_blocks_are_traced_again(tiny_checkpoint: Path) -> None:
    """A pool in which both cannot end at once: the younger one starts a block over."""
    llm = LLM(model=str(tiny_checkpoint), max_total_tokens=128, page_size=16)
    params = GREEDY.model_copy(update={"max_new_tokens": 60})
    other = tuple(int(i) for i in np.random.default_rng(0).integers(0, 256, 33))
    found = run(llm, ask("a", sampling=params, trace=True), ask("b", sampling=params, trace=True, prompt_ids=other))
    assert sum(outputs[-1].stats.retractions for outputs in found.values()) > 0
    for outputs in found.values():
        written: dict[int, int] = {}
        for step in (step for o in outputs for step in o.trace):
            written |= dict(zip(step.positions, step.token_ids, strict=True))
        assert [written[i] for i in range(60)] == [t for o in outputs for t in o.token_ids]


def test_alternatives_stand_beside_constrained_tokens_too(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_new_tokens=20, regex="[a-f]{18}")
    [outputs] = run(llm, ask(sampling=params, top_logprobs=2, logprob_ids=(ord("g"),), trace=True)).values()
    ids = [t for o in outputs for t in o.token_ids]
    logprobs = [p for o in outputs for p in o.output_logprobs or ()]
    others = [a for o in outputs for a in o.output_alternatives or ()]
    assert len(ids) == len(logprobs) == len(others) >= 18
    assert all(chr(i) in "abcdef" for i in ids[:18])
    # What the model itself would have said: a likelier token may not have been allowed.
    assert all(other.top_logprobs[0] >= value - 1e-9 for value, other in zip(logprobs, others, strict=True))
    assert all(math.isfinite(other.asked[0]) for other in others)

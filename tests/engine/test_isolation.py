"""One request that makes the model raise, or whose numbers go bad, fails alone; the others get the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.errors import EngineBroken
from losa_runtime.core.request import Request, RequestOutput
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.llm import Completion
from losa_runtime.sparse.method import METHODS, method_class
from tests.engine.faults import FaultyModel, break_embedding, install, raises_on
from tests.engine.leftovers import leftovers

FATAL = 65
PROMPTS = [[66 + (7 * i + j) % 150 for i in range(90)] for j in range(4)]
CULPRIT = [66 + (5 * i) % 150 for i in range(90)]


@pytest.fixture(scope="module", params=["off", "on"])
def shared_llm(tiny_checkpoint: Path, request: pytest.FixtureRequest) -> LLM:
    options: dict[str, Any] = {"debug_poison_pages": True, "overlap_schedule": request.param}
    return LLM(model=str(tiny_checkpoint), max_total_tokens=4096, **options)


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    model = shared_llm.engine.parts.runner.model
    yield shared_llm
    shared_llm.engine.parts.runner.model = model
    check_empty(shared_llm)
    assert shared_llm.engine.flush_cache()


def check_empty(llm: LLM) -> None:
    """Nothing of any request is left but unlocked pages in the tree."""
    llm.engine.rest()
    assert set(leftovers(llm.engine).values()) == {0}


def ids(tokens: list[int]) -> Any:
    return np.array(tokens, dtype=np.int32)


def wish(method: str = "dense", **values: Any) -> SamplingParams:
    budget: dict[str, Any] = {"token_budget": 32} if method_class(method).has_budget else {}
    custom = DiffusionParams(sparse_method=method, algorithm="low_confidence_static", denoising_steps=8, **budget)
    base: dict[str, Any] = {"temperature": 0.7, "sampling_seed": 5, "max_new_tokens": 40, "ignore_eos": True}
    bias = {FATAL: -1000.0}
    return SamplingParams(**{**base, "logit_bias": bias, "custom_params": custom, **values})


def together(llm: LLM, params: list[SamplingParams], culprit: SamplingParams) -> tuple[list[Completion], Completion]:
    """The innocent, and the culprit among them."""
    answers = llm.generate([*PROMPTS[:2], CULPRIT, *PROMPTS[2:]], [*params[:2], culprit, *params[2:]])
    return answers[:2] + answers[3:], answers[2]


@pytest.mark.parametrize("method", METHODS)
def test_the_others_get_the_same_tokens(llm: LLM, method: str) -> None:
    """The forward raises in the second layer of a later step: state of the first layer is already that of this step."""
    params = [wish(method, sampling_seed=i) for i in range(4)]
    alone = llm.generate(PROMPTS, params)
    undone = llm.engine.undone
    faulty = install(llm.engine, raises_on(FATAL, at_least=9))
    # The culprit writes nothing but the fatal token: two per step, so its fifth step in the second block raises.
    got, bad = together(llm, params, wish(method, logit_bias={FATAL: 1000.0}))
    assert bad.finish.type == "error" and bad.finish.status_code == 500
    assert "fault" not in str(bad.finish.message), "what was raised is for the log"
    assert [a.token_ids for a in got] == [a.token_ids for a in alone]
    assert [a.text for a in got] == [a.text for a in alone]
    assert faulty.struck == llm.engine.undone - undone == 2, "once together, once alone"


def test_a_prompt_that_raises(llm: LLM) -> None:
    params = [wish() for _ in range(4)]
    alone = llm.generate(PROMPTS, params)
    install(llm.engine, raises_on(FATAL))
    answers = llm.generate([*PROMPTS, [*CULPRIT[:40], FATAL, *CULPRIT]], [*params, wish()])
    assert answers[-1].finish.type == "error" and answers[-1].token_ids == ()
    assert [a.token_ids for a in answers[:-1]] == [a.token_ids for a in alone]


@pytest.mark.parametrize("fused", [True, False])
def test_a_block_that_cannot_be_stored(tiny_checkpoint: Path, fused: bool) -> None:
    llm = LLM(model=str(tiny_checkpoint), max_total_tokens=4096, disable_fused_commit=not fused)
    params = [wish(sampling_seed=i) for i in range(4)]
    alone = llm.generate(PROMPTS, params)
    install(llm.engine, raises_on(FATAL, at_least=16))  # a whole block of it: only the commit sees that
    got, bad = together(llm, params, wish(logit_bias={FATAL: 1000.0}))
    assert bad.finish.type == "error" and set(bad.token_ids) == {FATAL}, "the finished block was told"
    assert [a.token_ids for a in got] == [a.token_ids for a in alone]
    check_empty(llm)


def test_two_culprits_on_a_pool_that_is_too_small(tiny_checkpoint: Path) -> None:
    """Trials, retractions and evictions at once, on poisoned pages."""
    llm = LLM(model=str(tiny_checkpoint), max_total_tokens=416, debug_poison_pages=True, sparse_method="losa")
    params = [wish("losa", sampling_seed=i, max_new_tokens=90) for i in range(4)]
    alone = [llm.generate([prompt], p)[0] for prompt, p in zip(PROMPTS, params, strict=True)]
    install(llm.engine, raises_on(FATAL, at_least=7))
    fatal = wish("losa", logit_bias={FATAL: 1000.0}, max_new_tokens=60)
    answers = llm.generate([CULPRIT, *PROMPTS, CULPRIT[5:]], [fatal, *params, fatal])
    assert [answers[0].finish.type, answers[-1].finish.type] == ["error", "error"]
    assert [a.token_ids for a in answers[1:-1]] == [a.token_ids for a in alone]
    assert sum(a.stats.retractions for a in answers) > 0
    check_empty(llm)


def test_a_passing_fault_costs_nobody(llm: LLM) -> None:
    params = [wish("losa", sampling_seed=i) for i in range(4)]
    alone = llm.generate(PROMPTS, params)
    forwards = iter(range(10**6))
    install(llm.engine, lambda tokens_T, layer: layer == 1 and next(forwards) in (3, 17, 40))
    assert [a.token_ids for a in llm.generate(PROMPTS, params)] == [a.token_ids for a in alone]


def test_an_engine_that_always_raises_says_so(tiny_checkpoint: Path) -> None:
    llm = LLM(model=str(tiny_checkpoint), max_total_tokens=4096)
    install(llm.engine, lambda tokens_T, layer: True)
    for rid in "abc":
        llm.engine.add(Request(rid=rid, prompt_ids=tuple(PROMPTS[0]), sampling=wish()))
    assert llm.engine.step() == []
    with pytest.raises(EngineBroken, match="a fault in the model") as caught:
        llm.engine.step()
    assert caught.value.suspects == {"a"}


def test_many_culprits_one_after_the_other_end_the_engine_only_if_nothing_succeeds(llm: LLM) -> None:
    install(llm.engine, raises_on(FATAL))
    fatal = [FATAL, *CULPRIT]
    answers = llm.generate([fatal, fatal, fatal, PROMPTS[0], fatal, fatal, fatal], wish())
    assert [a.finish.type for a in answers] == ["error"] * 3 + ["length"] + ["error"] * 3
    with pytest.raises(EngineBroken):
        llm.generate([fatal] * 12, wish())
    llm.engine._failures = 0


@pytest.mark.parametrize("new", [0, 8])
def test_broken_keys_are_never_shared(llm: LLM, new: int) -> None:
    [before] = llm.generate([CULPRIT[:32]], wish(max_new_tokens=new))
    assert before.finish.type == "length"
    cached = llm.engine.parts.cache.peek("", ids(CULPRIT))
    healthy = break_embedding(llm.engine, CULPRIT[50])
    [bad] = llm.generate([CULPRIT], wish(max_new_tokens=new))
    break_embedding(llm.engine, CULPRIT[50], healthy)  # type: ignore[arg-type]
    assert bad.finish.type == "error" and "not finite" in str(bad.finish.message)
    assert llm.engine.parts.cache.peek("", ids(CULPRIT)) == cached == 32
    [again] = llm.generate([CULPRIT], wish(max_new_tokens=new))
    assert again.finish.type == "length" and again.cached_tokens == 32


def test_pages_behind_unusable_logits_are_taken_back(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks are stored and shared, then a logit is no number: none of what this request has stored stays."""
    model = llm.engine.parts.runner.model
    original = type(model).logits
    [whole] = llm.generate([CULPRIT[:32]], wish())
    assert llm.engine.flush_cache()
    llm.generate([CULPRIT[:16]], wish(max_new_tokens=0))  # somebody else's page, which stays
    calls = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(
            type(model), "logits", lambda self, h: original(self, h) * (float("nan") if next(calls) > 17 else 1)
        )
        [bad] = llm.generate([CULPRIT[:32]], wish())
    assert bad.finish.type == "error" and bad.token_ids == whole.token_ids[:32], "finished blocks were told"
    assert llm.engine.parts.cache.peek("", ids([*CULPRIT[:32], *whole.token_ids])) == 16
    assert llm.engine.stats()["pages_cached"] == 1


def test_a_failure_ends_once(llm: LLM) -> None:
    install(llm.engine, raises_on(FATAL))
    requests = [Request(rid=str(i), prompt_ids=tuple(p), sampling=wish()) for i, p in enumerate([[FATAL], *PROMPTS])]
    for request in requests:
        llm.engine.add(request)
    outputs: list[RequestOutput] = []
    while llm.engine.has_work():
        outputs += llm.engine.step()
    ends = [(o.rid, o.finish.type) for o in outputs if o.finish is not None]
    assert sorted(ends) == [("0", "error"), *((str(i), "length") for i in range(1, 5))]
    assert isinstance(llm.engine.parts.runner.model, FaultyModel)

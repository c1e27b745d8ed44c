"""Fast-dLLM v2's shifted logits in the engine: steps, scores, grammars, traces and faults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.request import Request, RequestOutput, ScoreSpec
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from tests.engine import plain_loop
from tests.engine.faults import install

BLOCK = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shifted")
    write_random_checkpoint(made, architecture="Fast_dLLM_QwenForCausalLM", seed=7, block_size=BLOCK)
    return made


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(model=str(folder), page_size=BLOCK, max_total_tokens=1024, show_progress=False)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def params(new: int, **more: Any) -> SamplingParams:
    custom = DiffusionParams(algorithm="low_confidence_static", denoising_steps=3)
    return SamplingParams(temperature=0.0, max_new_tokens=new, ignore_eos=True, custom_params=custom, **more)


def run(llm: LLM, request: Request) -> list[RequestOutput]:
    llm.engine.add(request)
    outputs: list[RequestOutput] = []
    while llm.engine.has_work():
        outputs += llm.engine.step()
    return outputs


def test_it_says_so(llm: LLM) -> None:
    info = llm.engine.info()
    assert info["shifted_logits"] is True and info["fused_commit"] is False


@pytest.mark.parametrize("length", [16, 19])
def test_logits_equal_the_plain_loop(llm: LLM, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    model, ids = llm.engine.parts.runner.model, prompt(length, seed=1)
    seen: list[Tensor] = []
    original = type(model).logits

    def recording(self: Any, hidden: Tensor) -> Tensor:
        logits = original(self, hidden)
        seen.append(logits.clone())
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "logits", recording)
        llm.engine.flush_cache()
        llm.generate([ids], params(19))
    want: list[Tensor] = []
    plain_loop.generate(
        model, ids, 19, 3, "low_confidence_static", vocab_size=llm.tokenizer.vocab_size,
        stop=(), seen_logits=want,
    )  # fmt: skip
    assert len(seen) == len(want)
    for mine, theirs in zip(seen, want, strict=True):
        finite = torch.isfinite(theirs)  # the loop bans ids in place after recording
        assert (mine - theirs)[finite].abs().max() < 2e-4


@pytest.mark.parametrize("rule", [(0.005, 0.0, 3, 0.0), (0.005, 0.0, 3, 9.0), (0.005, 0.0, 0, 9.0)])
@pytest.mark.parametrize("length", [15, 16])
def test_edits_equal_the_plain_loop(llm: LLM, rule: tuple[float, float, int, float], length: int) -> None:
    names = ("threshold", "edit_threshold", "post_edit_steps", "neighbour_penalty")
    ids, model = prompt(length, seed=length), llm.engine.parts.runner.model
    custom = DiffusionParams(algorithm="joint_threshold", **dict(zip(names, rule, strict=True)))
    [got] = llm.generate([ids], SamplingParams(temperature=0.0, max_new_tokens=41, custom_params=custom))
    stop = tuple(llm.engine.parts.eos_token_ids)
    want, edits = plain_loop.generate_with_edits(model, ids, 41, rule, llm.tokenizer.vocab_size, stop)
    assert list(got.token_ids) == want
    assert (edits > 0) == (rule[2] > 0)


def test_no_neighbour_in_another_block_is_avoided(llm: LLM) -> None:
    custom = DiffusionParams(algorithm="joint_threshold", threshold=0.0, post_edit_steps=0, neighbour_penalty=1e3)
    about: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logit_bias": {5: 500.0}, "max_new_tokens": 10}
    [got] = llm.generate([[*prompt(15, seed=8), 5]], SamplingParams(**about, custom_params=custom))
    assert [i for i, token in enumerate(got.token_ids) if token != 5] == [1, 9]


@pytest.mark.parametrize("least", [7, 8, 9, 16, 17])
def test_no_first_token_of_a_block_stops_too_early(llm: LLM, least: int) -> None:
    about: dict[str, Any] = {"logit_bias": {7: 500.0}, "stop_token_ids": (7,), "min_new_tokens": least}
    [got] = llm.generate([prompt(16, seed=9)], SamplingParams(temperature=0.0, max_new_tokens=30, **about))
    assert [i for i, token in enumerate(got.token_ids) if token == 7] == [least]
    assert got.finish is not None and got.finish.matched == 7


def test_a_whole_hit_computes_the_last_block_again(llm: LLM) -> None:
    llm.engine.flush_cache()
    ids = prompt(24, seed=2)
    [cold], [warm] = llm.generate([ids], params(10)), llm.generate([ids], params(10))
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 16)
    assert warm.token_ids == cold.token_ids
    [longer] = llm.generate([[*ids, 5]], params(3))
    assert longer.cached_tokens == 24


def test_scores_follow_the_chain_rule(llm: LLM) -> None:
    ids, model = prompt(20, seed=3), llm.engine.parts.runner.model
    [scores] = llm.score([ids], start=1)
    mask, size = llm.engine.parts.model_config.mask_token_id, llm.tokenizer.vocab_size
    for i, score in zip(range(1, 20), scores, strict=True):
        start = i - i % BLOCK
        tokens = ids[:i] + [mask] * (start + BLOCK - i if i % BLOCK else 0)
        logits = plain_loop.forward(model, tokens)[i - 1].clone()
        logits[mask] = logits[size:] = -torch.inf
        assert score == pytest.approx(float(logits.log_softmax(-1)[ids[i]]), abs=1e-4)


@pytest.mark.parametrize("length", [1, 2, BLOCK, BLOCK + 1, 20])
def test_the_first_token_of_all_has_no_score(llm: LLM, length: int) -> None:
    ids = prompt(length, 4)
    [whole], [rest] = llm.score([ids], start=0), llm.score([ids], start=1)
    assert whole[0] is None and whole[1:] == rest and len(whole) == length
    about = {"top_logprobs": 2, "logprob_ids": (7,)}
    request = Request(rid="r", prompt_ids=tuple(ids), sampling=params(3), score=ScoreSpec(start=0), **about)
    last = run(llm, request)[-1]
    assert last.prompt_logprobs is not None and last.prompt_alternatives is not None
    assert last.prompt_logprobs == pytest.approx(whole) and last.completion_tokens == 3
    assert last.prompt_alternatives[0] is None and len(last.prompt_alternatives) == length
    assert all(other is not None and len(other.top_ids) == 2 for other in last.prompt_alternatives[1:])


def test_no_prompt_has_no_first_token(llm: LLM) -> None:
    assert llm.score([[]], start=0) == [()]


@pytest.mark.parametrize("mode", ["map", "valid"])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_grammar_holds_for_first_tokens_too(llm: LLM, mode: str, temperature: float) -> None:
    custom = DiffusionParams(grammar_mode=mode, denoising_steps=3)
    pattern = "(ab|c[de]f){7}[xyz]*"
    about: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 26, "regex": pattern, "sampling_seed": 3}
    for length in (8, 11, 16):
        [got] = llm.generate([prompt(length, length)], SamplingParams(custom_params=custom, **about))
        assert re.fullmatch(pattern, got.text), got.text


def test_a_trace_and_alternatives_cover_every_token_once(llm: LLM) -> None:
    about = {"prompt_ids": tuple(prompt(16, 5)), "sampling": params(20), "output_logprobs": True}
    outputs = run(llm, Request(rid="r", trace=True, top_logprobs=2, **about))
    ids = [t for o in outputs for t in o.token_ids]
    steps = [step for o in outputs for step in o.trace]
    revealed = [p for step in steps for p in step.positions]
    assert sorted(revealed) == list(range(20))
    written = {p: t for step in steps for p, t in zip(step.positions, step.token_ids, strict=True)}
    assert [written[i] for i in range(20)] == ids
    assert [step.step for step in steps if 0 in step.positions] == [0]
    others = [a for o in outputs for a in o.output_alternatives or ()]
    assert [other.top_ids[0] for other in others] == ids, "greedy tokens are the likeliest"


def test_a_fault_in_the_middle_of_a_block_changes_nothing(llm: LLM) -> None:
    ids = prompt(16, seed=6)
    [want] = llm.generate([ids], params(20))
    model, calls = llm.engine.parts.runner.model, iter(range(1000))
    install(llm.engine, lambda tokens_T, layer: layer == 1 and next(calls) == 5)
    try:
        [got] = llm.generate([ids], params(20))
    finally:
        llm.engine.parts.runner.model = model
    assert got.token_ids == want.token_ids
    assert llm.engine.undone == 1

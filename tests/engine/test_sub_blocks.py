"""Sub-blocks through the engine: the tokens of a plain loop, and what else is promised of a block, part by part."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.request import Request, StepTrace
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from tests.engine import plain_loop
from tests.engine.test_exact import RULES

BLOCK = 16


@pytest.fixture(scope="module", params=["SDARForCausalLM", "Fast_dLLM_QwenForCausalLM"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("sub_blocks")
    write_random_checkpoint(folder, architecture=request.param, seed=3, block_size=BLOCK)
    return LLM(model=str(folder), max_total_tokens=2048, chunked_prefill_size=64)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(new: int, **custom: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=new, custom_params=DiffusionParams(**custom))


def plain(llm: LLM, ids: list[int], new: int, steps: int, rule: str, bound: float, sub_block: int) -> list[int]:
    about = (llm.tokenizer.vocab_size, tuple(llm.engine.parts.eos_token_ids))
    model = llm.engine.parts.runner.model
    return plain_loop.generate(model, ids, new, steps, rule, bound, *about, sub_block=sub_block)


def traces(llm: LLM, ids: list[int], params: SamplingParams) -> tuple[list[int], str, list[StepTrace]]:
    llm.engine.add(Request(rid="r", prompt_ids=tuple(ids), sampling=params, trace=True))
    outputs = []
    while llm.engine.has_work():
        outputs += llm.engine.step()
    steps = [step for output in outputs for step in output.trace]
    return [t for o in outputs for t in o.token_ids], "".join(o.text for o in outputs), steps


def check_order(steps: list[StepTrace], prompt_len: int, sub_block: int, first_comes_alone: bool) -> None:
    """Nothing outside the leftmost sub-block with masks; a shifted model's first token belongs to no step."""
    left: set[int] = set()
    for step in steps:
        positions = set(step.positions)
        if step.step == 0:
            left = set(range(step.start, step.stop))
            if first_comes_alone and (prompt_len + step.start) % BLOCK == 0:
                positions.discard(step.start)
                left.discard(step.start)
        if not positions:  # the first token was all there was to come
            assert first_comes_alone and step.step == 0
            continue
        open_ = min((p + prompt_len) // sub_block for p in left)
        assert {(p + prompt_len) // sub_block for p in positions} == {open_}
        left -= positions


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("length", "new", "steps", "sub_block"),
    [(1, 40, 16, 8), (16, 33, 5, 4), (31, 20, 16, 2), (21, 40, 4, 8), (48, 5, 7, 8), (9, 24, 16, 1)],
)
def test_tokens_equal_the_plain_loop(llm: LLM, rule: str, length: int, new: int, steps: int, sub_block: int) -> None:
    ids = prompt(length, seed=length)
    knob = {"low_confidence_dynamic": ("threshold", 0.02), "entropy_bounded": ("entropy_bound", 12.0)}.get(rule)
    about = {"algorithm": rule, "denoising_steps": steps, "sub_block_length": sub_block}
    [got] = llm.generate([ids], greedy(new, **about, **({} if knob is None else dict([knob]))))
    assert list(got.token_ids) == plain(llm, ids, new, steps, rule, knob[1] if knob else 0.0, sub_block)
    assert got.stats.denoise_steps <= steps * got.stats.blocks


def test_the_preset_is_the_published_loop(llm: LLM) -> None:
    """While the sub-block has masks: all above 0.95, and always the best one."""
    ids = prompt(19, seed=1)
    [got] = llm.generate([ids], greedy(37, preset="fast-dllm-v2"))
    assert list(got.token_ids) == plain(llm, ids, 37, BLOCK, "low_confidence_dynamic", 0.95, 8)
    with pytest.raises(InvalidRequest, match="sub_block_length: found 3, allowed: a divisor of the block length of 16"):
        llm.generate([ids], greedy(5, preset="fast-dllm-v2", sub_block_length=3))


@pytest.mark.parametrize("method", ["losa", "losa_plus", "mage"])
def test_full_budget_equals_dense(llm: LLM, method: str) -> None:
    ids, asks = prompt(100, seed=2), {"sub_block_length": 4, "threshold": 0.02}
    [dense] = llm.generate([ids], greedy(40, sparse_method="dense", **asks))
    full: dict[str, Any] = {"token_budget": 512, "active_tokens": BLOCK} if method == "losa" else {"token_budget": 512}
    [sparse] = llm.generate([ids], greedy(40, sparse_method=method, **full, **asks))
    assert sparse.token_ids == dense.token_ids


@pytest.mark.parametrize("rule", [*RULES, "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("length", [5, 16, 28])
def test_nothing_outside_the_open_sub_block_is_accepted(llm: LLM, rule: str, temperature: float, length: int) -> None:
    custom = DiffusionParams(algorithm=rule, denoising_steps=8, sub_block_length=4)
    about: dict[str, Any] = {"max_new_tokens": 41, "ignore_eos": True, "sampling_seed": length}
    params = SamplingParams(temperature=temperature, custom_params=custom, **about)
    ids, _, steps = traces(llm, prompt(length, seed=4), params)
    assert len(ids) == 41
    assert sorted(p for step in steps for p in step.positions) == list(range(41)), "each once"
    check_order(steps, length, 4, llm.engine.parts.runner.model.shifted_logits)


@pytest.mark.parametrize("mode", ["map", "valid"])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_grammar_holds(llm: LLM, mode: str, temperature: float) -> None:
    custom = DiffusionParams(grammar_mode=mode, denoising_steps=6, sub_block_length=4, threshold=0.3)
    about: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 26, "sampling_seed": 3}
    pattern = "(ab|c[de]f){7}[xyz]*"
    for length in (8, 11, 16):
        params = SamplingParams(custom_params=custom, regex=pattern, **about)
        _, text, steps = traces(llm, prompt(length, seed=length), params)
        assert re.fullmatch(pattern, text), text
        check_order(steps, length, 4, llm.engine.parts.runner.model.shifted_logits)


def test_a_stop_token_ends_a_request_inside_a_block(llm: LLM) -> None:
    """The token that stands at 5 of the output: the later sub-blocks are never begun."""
    ids, about = prompt(16, seed=5), {"algorithm": "sequential", "sub_block_length": 4}
    [whole] = llm.generate([ids], greedy(16, **about))
    stop = whole.token_ids[5]
    end = whole.token_ids.index(stop) + 1
    custom = DiffusionParams(**about)
    params = SamplingParams(
        temperature=0.0, max_new_tokens=16, ignore_eos=True, stop_token_ids=(stop,), custom_params=custom
    )
    [cut] = llm.generate([ids], params)
    assert cut.token_ids == whole.token_ids[:end] and cut.finish.matched == stop
    assert cut.stats.denoise_steps <= end < whole.stats.denoise_steps


def test_company_and_retraction_change_nothing(llm: LLM) -> None:
    rules = ["low_confidence_dynamic", "entropy_bounded", "random", "sequential", "margin", "joint_threshold"]
    wishes: list[tuple[list[int], SamplingParams]] = []
    for n, rule in enumerate(rules):
        parts = {} if rule == "joint_threshold" else {"sub_block_length": (2, 4, 8)[n % 3], "denoising_steps": 9}
        custom = DiffusionParams(algorithm=rule, sparse_method="losa" if n % 2 else "dense", **parts)
        about: dict[str, Any] = {"temperature": 0.8, "sampling_seed": n, "max_new_tokens": 40}
        about |= {"regex": "(ab|c[de]f){9}[xyz]*"} if n in (1, 3) else {"ignore_eos": True}
        wishes.append((prompt(13 * n + 3, seed=n), SamplingParams(custom_params=custom, **about)))
    alone = [llm.generate([ids], wish)[0].token_ids for ids, wish in wishes]
    small = LLM(model=llm.engine.parts.folder, max_total_tokens=176)
    got = small.generate([ids for ids, _ in wishes], [wish for _, wish in wishes])
    assert [g.token_ids for g in got] == alone
    assert sum(g.stats.retractions for g in got) > 0

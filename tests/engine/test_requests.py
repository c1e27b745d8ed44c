"""What a request may ask: limits, stops, seeds, biases; and that each impossible wish gets a clear answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.errors import CheckpointError, ConfigError, InvalidRequest, LosaError, QueueFull
from losa_runtime.core.request import Request, RequestOutput, ScoreSpec
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.models.random_checkpoint import write_random_checkpoint

PROMPT = list(range(30, 60))


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return LLM(model=str(tiny_checkpoint), max_total_tokens=4096)


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.8, "sampling_seed": 1, "max_new_tokens": 40, **values})


def drain(llm: LLM) -> list[RequestOutput]:
    outputs = []
    while llm.engine.has_work():
        outputs += llm.engine.step()
    return outputs


def test_seeds_decide_and_repeat(llm: LLM) -> None:
    a, b, c = llm.generate([PROMPT] * 3, [params(), params(), params(sampling_seed=2)])
    assert a.token_ids == b.token_ids != c.token_ids
    x, y = llm.generate([PROMPT] * 2, params(sampling_seed=None))
    assert x.token_ids != y.token_ids, "requests without a seed get their own"


def test_greedy_is_temperature_zero_top_k_one_and_the_limit_of_low_temperature(llm: LLM) -> None:
    in_order = DiffusionParams(algorithm="sequential")  # the others unmask by confidence, which temperature changes
    wishes = [{"temperature": 0.0}, {"temperature": 1e-6}, {"top_k": 1}]
    a, b, c = llm.generate([PROMPT] * 3, [params(custom_params=in_order, **wish) for wish in wishes])
    assert a.token_ids == b.token_ids == c.token_ids


def test_a_bias_can_force_and_forbid(llm: LLM) -> None:
    [forced] = llm.generate([PROMPT], params(logit_bias={65: 1000.0}))
    assert set(forced.token_ids) == {65} and forced.text == "A" * 40
    [free] = llm.generate([PROMPT], params(temperature=0.0))
    [without] = llm.generate([PROMPT], params(temperature=0.0, logit_bias=dict.fromkeys(free.token_ids, -1000.0)))
    assert not set(free.token_ids) & set(without.token_ids)


def test_eos_ends_unless_ignored_or_too_early(llm: LLM) -> None:
    eos = max(llm.engine.parts.eos_token_ids)
    loves_eos = {eos: 1000.0}
    [ended] = llm.generate([PROMPT], params(logit_bias=loves_eos))
    assert ended.token_ids == (eos,) and ended.finish.type == "stop" and ended.finish.matched == eos
    assert ended.text == ""
    [ignored] = llm.generate([PROMPT], params(logit_bias=loves_eos, ignore_eos=True))
    assert len(ignored.token_ids) == 40 and eos not in ignored.token_ids
    [late] = llm.generate([PROMPT], params(logit_bias=loves_eos, min_new_tokens=9))
    assert len(late.token_ids) == 10 and late.token_ids.index(eos) == 9


def test_stop_token_ids_end_the_output_and_are_not_spoken(llm: LLM) -> None:
    stop = params(temperature=0.0, logit_bias={65: 1000.0}, stop_token_ids=(65,))
    [got] = llm.generate([PROMPT], stop)
    assert (got.token_ids, got.text, got.finish.matched) == ((65,), "", 65)
    [kept] = llm.generate([PROMPT], stop.model_copy(update={"no_stop_trim": True}))
    assert kept.text == "A"


def test_a_stop_string_is_found_across_a_block_border(llm: LLM) -> None:
    letters = params(temperature=50.0, logit_bias=dict.fromkeys(range(97, 123), 1000.0))
    [free] = llm.generate([PROMPT], letters)
    # The prompt ends at 30, so the first block border is behind two tokens of output and the second behind 18.
    stop = free.text[14:22]
    assert free.text.find(stop) == 14 and stop.isalpha()
    [got] = llm.generate([PROMPT], letters.model_copy(update={"stop": (stop, "never said")}))
    assert got.finish.type == "stop" and got.finish.matched == stop
    assert (got.text, got.token_ids) == (free.text[:14], free.token_ids[:22])


def test_max_new_tokens_cuts_inside_a_block(llm: LLM) -> None:
    for new in (1, 2, 3, 17):
        [got] = llm.generate([PROMPT], params(max_new_tokens=new, ignore_eos=True))
        assert len(got.token_ids) == new and got.finish.type == "length"


def test_no_limit_means_up_to_the_context(tiny_checkpoint: Path) -> None:
    llm = LLM(model=str(tiny_checkpoint), context_length=64)
    [got] = llm.generate([PROMPT], params(max_new_tokens=None, ignore_eos=True))
    assert len(got.token_ids) == 64 - len(PROMPT)


def test_output_logprobs_are_those_of_the_accepted_tokens(llm: LLM) -> None:
    [got] = llm.generate([PROMPT], params(), logprobs=True)
    assert got.logprobs is not None and len(got.logprobs) == len(got.token_ids)
    assert all(p <= 0 for p in got.logprobs) and len(set(got.logprobs)) > 5


def test_penalties_see_tokens_of_the_current_block(llm: LLM) -> None:
    one_by_one = DiffusionParams(algorithm="sequential")
    plain, careful = llm.generate(
        [PROMPT] * 2,
        [params(temperature=0.0, custom_params=one_by_one, ignore_eos=True, presence_penalty=p) for p in (0.0, 2.0)],
    )
    [never] = llm.generate([PROMPT], params(temperature=0.0, custom_params=one_by_one, repetition_penalty=2.0))
    assert len(set(careful.token_ids)) > len(set(plain.token_ids))
    assert len(set(never.token_ids)) > len(set(plain.token_ids))


@pytest.mark.parametrize(
    ("ids", "wish", "field"),
    [
        ([], {}, "prompt"),
        (list(range(100)), {"max_new_tokens": 5000}, "max_new_tokens"),
        ([1] * 5000, {}, "prompt"),
        ([1, 259], {}, r"input_ids\.1"),
        ([1, 300], {}, r"input_ids\.1"),
        ([1, -1], {}, r"input_ids\.1"),
        ([1, 2**70], {}, "input_ids"),
        ([1], {"logit_bias": {999: 1.0}}, "logit_bias"),
        ([1], {"n": 2}, r"sampling_params\.n"),
        ([1], {"max_new_tokens": None, "min_new_tokens": 10**6}, "min_new_tokens"),
        ([1], {"custom_params": DiffusionParams(algorithm="sequential", threshold=0.5)}, "threshold"),
        ([1], {"stop_token_ids": (999,)}, "stop_token_ids"),
        ([1], {"custom_params": DiffusionParams(sparse_method="magic")}, "dense, quest, losa"),
        ([1], {"custom_params": DiffusionParams(sparse_method="losa", token_budget=17)}, "16 or 32"),
        ([1], {"custom_params": DiffusionParams(sparse_method="losa", active_tokens=17)}, "active_tokens"),
        ([1], {"custom_params": DiffusionParams(sparse_method="quest", active_tokens=2)}, "active_tokens"),
        ([1], {"custom_params": DiffusionParams(algorithm="magic")}, "sequential"),
        ([1], {"custom_params": DiffusionParams(denoising_steps=17)}, "denoising_steps"),
    ],
)
def test_impossible_wishes_are_refused_by_name(llm: LLM, ids: list[int], wish: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        llm.generate([PROMPT, ids], [params(), params(**wish)])
    assert caught.value.field.startswith("prompts[1].")
    assert not llm.engine.has_work() and llm.engine.parts.cache.owned_pages == 0


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 2**63},
        {"max_new_tokens": 2**40},
        {"min_new_tokens": 10**5000},
        {"temperature": 10**400},
        {"logit_bias": {"65": 1e39}},
        {"logit_bias": {"65": float("nan")}},
        {"repetition_penalty": 1e-300},
        {"spaces_between_special_tokens": False},
        {"custom_params": {"token_budget": 2**63}},
        {"custom_params": {"threshold": 10**400}},
        {"custom_params": {"denoising_steps": 2**63}},
    ],
    ids=["-".join(v) + str(i) for i, v in enumerate([["big"]] * 11)],
)
def test_numbers_that_no_tensor_can_hold_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(values))):
        SamplingParams.parse(values)


@pytest.mark.parametrize("prompts", [[1.5, 2.0], [None], [["a"]], 7, [[1.5, 2]]], ids=str)
def test_prompts_of_wrong_types_are_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompts"):
        llm.generate(prompts, params())


def test_arrays_are_token_ids_and_empty_lists_are_no_work(llm: LLM) -> None:
    [listed], [array] = (llm.generate(p, params()) for p in (PROMPT, np.array(PROMPT)))
    assert listed.token_ids == array.token_ids
    assert llm.generate([]) == []


def test_an_interrupted_call_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([False, False, True])
    original = llm.engine.parts.runner.launch

    def interrupted(work: Any) -> Any:
        if next(steps, False):
            raise KeyboardInterrupt
        return original(work)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.parts.runner, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT, PROMPT[1:]], params())
    assert not llm.engine.has_work() and llm.engine.parts.cache.owned_pages == 0
    assert len(llm.generate([PROMPT], params(ignore_eos=True))[0].token_ids) == 40


def test_a_prompt_that_cannot_be_scored_is_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model = type(llm.engine.parts.runner.model)
    original = model.logits
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", lambda self, hidden: original(self, hidden) * torch.nan)
        with pytest.raises(LosaError, match="not finite"):
            llm.score([PROMPT])
    with pytest.raises(InvalidRequest, match="start"):
        llm.score([PROMPT], start=-1)


def test_score_start_behind_the_prompt_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="logprob_start_len"):
        llm.engine.add(Request(rid="r", prompt_ids=(1, 2), score=ScoreSpec(start=3)))


def test_a_live_id_cannot_be_used_twice_and_a_full_queue_says_so(tiny_checkpoint: Path) -> None:
    llm = LLM(model=str(tiny_checkpoint), max_queued_requests=1)
    llm.engine.add(Request(rid="r", prompt_ids=(1, 2)))
    with pytest.raises(InvalidRequest, match="rid"):
        llm.engine.add(Request(rid="r", prompt_ids=(1, 2)))
    with pytest.raises(QueueFull):
        llm.engine.add(Request(rid="s", prompt_ids=(1, 2)))


def test_abort_in_mid_block_gives_everything_back(llm: LLM) -> None:
    for rid in ("a", "b"):
        llm.engine.add(Request(rid=rid, prompt_ids=tuple(PROMPT), sampling=params(sampling_seed=3)))
    outputs = llm.engine.step() + llm.engine.step()
    assert llm.engine.abort("a") and not llm.engine.abort("zzz")
    assert not llm.engine.flush_cache(), "a flush waits until nothing is live"
    outputs += drain(llm)
    ends = {o.rid: o.finish.type for o in outputs if o.finish is not None}
    assert ends == {"a": "abort", "b": "length"} or ends == {"a": "abort", "b": "stop"}
    [alone] = llm.generate([PROMPT], params(sampling_seed=3))
    assert tuple(t for o in outputs if o.rid == "b" for t in o.token_ids) == alone.token_ids
    assert llm.engine.flush_cache() and llm.engine.stats()["pages_cached"] == 0


def test_a_request_with_unusable_logits_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llm.engine.parts.runner.model
    original = type(model).logits
    step_by_step = params(custom_params=DiffusionParams(threshold=1.0), ignore_eos=True)
    [healthy] = llm.generate([PROMPT[:16]], step_by_step)

    def poisoned(self: Any, hidden: Tensor) -> Tensor:
        logits = original(self, hidden)
        if logits.shape[0] > 16:  # both requests are there: the second one's rows go bad
            logits[16:] = torch.nan
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "logits", poisoned)
        good, bad = llm.generate([PROMPT[:16], PROMPT[1:17]], step_by_step)
    assert bad.finish.type == "error" and "not finite" in str(bad.finish.message)
    assert good.token_ids == healthy.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse_method": "magic"}, "sparse_method"),
        ({"token_budget": 100}, "token_budget"),
        ({"algorithm": "magic"}, "algorithm"),
        ({"denoising_steps": 99}, "denoising_steps"),
        ({"page_size": 24, "token_budget": 240}, "divide"),
        ({"context_length": 10**6}, "context_length"),
        ({"max_total_tokens": 10**12}, "max_total_tokens"),
        ({"max_total_tokens": 16}, "max_total_tokens"),
        ({"device": "cuda"}, "device"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"threshold": 2.0}, "threshold"),
        ({"attention_backend": "magic"}, "attention_backend"),
    ],
)
def test_impossible_configurations_are_refused_at_start(
    tiny_checkpoint: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(model=str(tiny_checkpoint), **options)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, preset="tiny", vocab_size=260)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 260, "content": "<|more|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="tokenizer"):
        LLM(model=str(tmp_path))


def test_a_missing_checkpoint_is_named() -> None:
    with pytest.raises(CheckpointError, match="no-such-folder"):
        LLM(model="/no-such-folder")

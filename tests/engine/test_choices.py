"""Choices among given texts: their scores against scoring everything anew, and what of it is computed at all.

The definition: log p(token | all earlier blocks, the tokens before it in its own block, MASK from it to the end of the
block). The oracle has no cache, no pages and no batch: the whole sequence again for every token.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.request import Request, RequestOutput, ScoreSpec
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from tests.engine import plain_loop

PROMPT = [30 + 7 * i % 200 for i in range(37)]
CHOICES = [[65], [66, 67, 68], [66, 67, 99, 100, 101, 102], [70 + i for i in range(20)], [90, 91]]


@pytest.fixture(scope="module", params=[16, 4])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder: Path = tmp_path_factory.mktemp("model")
    write_random_checkpoint(folder, preset="tiny", seed=11, block_size=request.param)
    found = LLM(model=str(folder), max_total_tokens=4096, page_size=request.param)
    # Random weights are nearly indifferent: sharper ones tell the rules apart.
    with torch.no_grad():
        head = found.engine.parts.runner.model.lm_head  # type: ignore[attr-defined]
        head.weight.mul_(40.0)
    return found


def oracle(llm: LLM, prompt: list[int], choice: list[int]) -> list[float]:
    """The scores of a choice behind a prompt, one by one."""
    model, about = llm.engine.parts.runner.model, llm.engine.parts.model_config
    known, found = list(prompt), []
    for token in choice:
        masks = about.block_length - len(known) % about.block_length
        logits = plain_loop.forward(model, known + [about.mask_token_id] * masks)[len(known)].double()
        logits[about.mask_token_id] = logits[llm.tokenizer.vocab_size :] = -math.inf
        found.append(float(logits.log_softmax(-1)[token]))
        known.append(token)
    return found


def ask(llm: LLM, prompts: list[list[int]], starts: list[int]) -> list[RequestOutput]:
    """Scores of prompts, all together, as a server asks for them."""
    nothing = SamplingParams(max_new_tokens=0)
    for i, (ids, start) in enumerate(zip(prompts, starts, strict=True)):
        llm.engine.add(Request(rid=str(i), prompt_ids=tuple(ids), sampling=nothing, score=ScoreSpec(start=start)))
    ends: dict[str, RequestOutput] = {}
    while llm.engine.has_work():
        ends |= {output.rid: output for output in llm.engine.step() if output.finish is not None}
    return [ends[str(i)] for i in range(len(prompts))]


def scores(llm: LLM, prompt: list[int]) -> list[list[float]]:
    found = ask(llm, [prompt + choice for choice in CHOICES], [len(prompt)] * len(CHOICES))
    assert all(output.prompt_logprobs is not None for output in found)
    return [list(output.prompt_logprobs or ()) for output in found]


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:32], PROMPT[:1]], ids=["in a block", "whole blocks", "one token"])
def test_scores_are_those_of_scoring_everything_anew(llm: LLM, prompt: list[int]) -> None:
    for found, choice in zip(scores(llm, prompt), CHOICES, strict=True):
        assert found == pytest.approx(oracle(llm, prompt, choice), abs=1e-3)


def test_scores_of_all_tokens_at_a_place_make_a_distribution(llm: LLM) -> None:
    mask = llm.engine.parts.model_config.mask_token_id
    every = [token for token in range(llm.tokenizer.vocab_size) if token != mask]
    found = ask(llm, [[*PROMPT, 66, token] for token in every], [len(PROMPT) + 1] * len(every))
    total = sum(math.exp((output.prompt_logprobs or (-math.inf,))[0]) for output in found)
    assert total == pytest.approx(1.0, abs=1e-5)


def test_the_rules_decide_as_by_hand(llm: LLM) -> None:
    """Once with scores of the engine and SGLang's own rules, once with the oracle's and their definitions."""
    from sglang.lang import choices as rules

    given, alone = scores(llm, PROMPT), [list(map(float, each)) for each in scores(llm, [])]
    names = [str(choice) for choice in CHOICES]
    arguments = {
        "choices": names,
        "normalized_prompt_logprobs": [math.fsum(each) / len(each) for each in given],
        "input_token_logprobs": [[(value, None, None) for value in each] for each in given],
        "output_token_logprobs": [[] for _ in given],
        "unconditional_token_logprobs": [[(value, None, None) for value in each] for each in alone],
    }
    theirs = [
        rule(**arguments).decision
        for rule in (
            rules.token_length_normalized,
            rules.greedy_token_selection,
            rules.unconditional_likelihood_normalized,
        )
    ]
    mine, bare = [oracle(llm, PROMPT, choice) for choice in CHOICES], [oracle(llm, [], choice) for choice in CHOICES]
    means = [math.fsum(each) / len(each) for each in mine]
    longest = max(map(len, CHOICES))
    greedy = [[*each, *([mean] * (longest - len(each)))] for each, mean in zip(mine, means, strict=True)]
    gains = [mean - math.fsum(each) / len(each) for mean, each in zip(means, bare, strict=True)]
    order = range(len(CHOICES))
    by_hand = [max(order, key=means.__getitem__), max(order, key=greedy.__getitem__), max(order, key=gains.__getitem__)]
    assert theirs == [names[i] for i in by_hand]
    assert len(set(theirs)) > 1  # or the rules would not be told apart


def test_the_prefix_is_computed_once_and_only_the_asked_positions_are_scored(llm: LLM) -> None:
    length = llm.engine.parts.model_config.block_length
    assert llm.engine.flush_cache()
    before = dict(llm.engine.stats()["rows"])  # type: ignore[call-overload]
    [first] = ask(llm, [[*PROMPT, *CHOICES[0]]], [len(PROMPT)])
    others = ask(llm, [[*PROMPT, *choice] for choice in CHOICES[1:]], [len(PROMPT)] * (len(CHOICES) - 1))
    after = llm.engine.stats()["rows"]
    rows = {mode: count - before[mode] for mode, count in after.items()}  # type: ignore[attr-defined]
    shared = len(PROMPT) // length * length
    assert first.cached_tokens == 0 and [output.cached_tokens for output in others] == [shared] * len(others)
    ends = [(len(PROMPT) + len(choice)) // length * length for choice in CHOICES]
    assert rows["prefill"] == shared + sum(end - shared for end in ends)  # the prompt once, and what choices fill
    assert rows["score"] == length * sum(map(len, CHOICES))
    assert rows["denoise"] == rows["open"] == rows["commit"] == 0
    assert [len(output.prompt_logprobs or ()) for output in (first, *others)] == [len(choice) for choice in CHOICES]

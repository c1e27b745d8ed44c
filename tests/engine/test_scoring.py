"""Scoring a long prompt beside generations, with a real model: who generates goes on, and gets the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.request import Request, RequestOutput, ScoreSpec

TALK = SamplingParams(temperature=0.0, max_new_tokens=64, ignore_eos=True)
NOTHING = SamplingParams(max_new_tokens=0)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return LLM(model=str(tiny_checkpoint), max_total_tokens=4096, chunked_prefill_size=128)


def test_generations_go_on_beside_a_long_scoring(llm: LLM) -> None:
    prompt, text = list(range(30, 60)), [30 + i % 200 for i in range(600)]
    [alone] = llm.generate([prompt], TALK)
    [scores] = llm.score([text])
    llm.engine.flush_cache()
    llm.engine.add(Request(rid="select", prompt_ids=tuple(text), sampling=NOTHING, score=ScoreSpec(start=0)))
    while not llm.engine.scheduler.running or llm.engine.scheduler.running[0].prefilling:
        llm.engine.step()
    llm.engine.add(Request(rid="talk", prompt_ids=tuple(prompt), sampling=TALK))
    outputs: list[RequestOutput] = []
    while llm.engine.has_work():
        outputs += llm.engine.step()
    order = [output.rid for output in outputs if output.finish is not None]
    assert order == ["talk", "select"]
    assert [t for output in outputs if output.rid == "talk" for t in output.token_ids] == list(alone.token_ids)
    last = outputs[-1].prompt_logprobs
    assert last is not None
    assert list(last) == pytest.approx(list(scores), abs=1e-3)

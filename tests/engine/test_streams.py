"""The offline face piece by piece: the same answer, given up without a trace, interrupted between steps only."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.errors import InvalidRequest, LosaError
from losa_runtime.core.request import RequestOutput

PROMPT = list(range(30, 60))
PARAMS = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return LLM(model=str(tiny_checkpoint), max_total_tokens=4096)


def owned_pages(llm: LLM) -> int:
    return llm.engine.parts.cache.owned_pages


def test_a_stream_is_the_answer_in_pieces(llm: LLM) -> None:
    news = list(llm.stream(PROMPT, PARAMS))
    [whole] = llm.generate([PROMPT], PARAMS)
    assert "".join(piece.text for piece in news) == whole.text
    assert tuple(token for piece in news for token in piece.token_ids) == whole.token_ids
    assert len([piece for piece in news if piece.token_ids]) >= 3
    assert [piece.finish is not None for piece in news] == [False] * (len(news) - 1) + [True]


def test_a_stream_may_be_given_up(llm: LLM) -> None:
    stream = llm.stream(PROMPT, PARAMS)
    assert next(stream).finish is None
    assert llm.engine.has_work()
    stream.close()
    assert owned_pages(llm) == 0
    assert not llm.engine.has_work()


def test_one_thing_at_a_time(llm: LLM) -> None:
    stream = llm.stream(PROMPT, PARAMS)
    next(stream)
    with pytest.raises(LosaError, match="a stream of this LLM has not ended"):
        llm.generate([PROMPT], PARAMS)
    with pytest.raises(LosaError, match="a stream of this LLM has not ended"):
        next(llm.stream(PROMPT, PARAMS))
    assert len(list(stream)) > 1


def test_what_cannot_be_streamed_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"prompts\[0\].sampling_params.max_new_tokens"):
        next(llm.stream(PROMPT, SamplingParams(max_new_tokens=10**6)))
    assert not llm.engine.has_work()


def test_an_interrupt_waits_for_the_end_of_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, whole_steps = llm.engine.step, []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it

    def interrupted() -> list[RequestOutput]:
        os.kill(os.getpid(), signal.SIGINT)
        outputs = step()
        whole_steps.append(len(outputs))
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted)
        patch.setattr(llm, "_abandon", lambda _: None)  # its steps would be interrupted, too
        with pytest.raises(KeyboardInterrupt):
            list(llm.stream(PROMPT, PARAMS))
    assert len(whole_steps) == 1
    llm.engine.abort(llm.engine.scheduler.running[0].request.rid)
    step()
    assert owned_pages(llm) == 0
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_other_threads_need_no_signals(llm: LLM) -> None:
    found: list[RequestOutput] = []
    thread = threading.Thread(target=lambda: found.extend(llm.stream(PROMPT, PARAMS)))
    thread.start()
    thread.join(60)
    assert found[-1].finish is not None

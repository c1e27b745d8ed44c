"""With a forward in flight between two steps everything is told as without, and whatever ends meanwhile ends once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.request import Request, RequestOutput, ScoreSpec
from losa_runtime.core.sampling_params import DiffusionParams

PROMPTS = [[66 + (7 * i + 3 * j) % 150 for i in range(20 + 9 * j)] for j in range(4)]
LETTERS = dict.fromkeys(range(97, 123), 1000.0)


def engine_with(checkpoint: Path, overlap: str, **options: Any) -> LLM:
    return LLM(model=str(checkpoint), overlap_schedule=overlap, **{"max_total_tokens": 4096, **options})


def wishes(stop: str = "never") -> list[Request]:
    """Of all kinds, some ending by a stop string that only their text shows."""
    base: dict[str, Any] = {"temperature": 9.0, "logit_bias": LETTERS, "max_new_tokens": 40, "ignore_eos": True}
    losa = DiffusionParams(sparse_method="losa", token_budget=16)
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"stop": (stop,)}, {"trace": True}),
        ({"custom_params": losa}, {"output_logprobs": True, "top_logprobs": 2}),
        ({"max_new_tokens": 0}, {"score": ScoreSpec(start=5)}),
        ({"stop_token_ids": (104,)}, {}),
        ({"max_new_tokens": 0}, {}),
    ]
    requests = []
    for index, (sampling, fields) in enumerate(kinds * 2):
        params = SamplingParams(**{**base, "sampling_seed": index % 5, **sampling})
        prompt = tuple(PROMPTS[index % 4])
        requests.append(Request(rid=str(index), prompt_ids=prompt, sampling=params, **fields))
    return requests


def told(llm: LLM, requests: Sequence[Request]) -> dict[str, list[RequestOutput]]:
    """All outputs by request; two requests arrive in each round."""
    engine, left = llm.engine, list(requests)
    outputs: dict[str, list[RequestOutput]] = {request.rid: [] for request in requests}
    while left or engine.has_work():
        for request in left[:2]:
            engine.add(request)
        del left[:2]
        for output in engine.step():
            outputs[output.rid].append(output)
    engine.rest()
    return outputs


def timeless(output: RequestOutput) -> RequestOutput:
    """Without what is measured with a clock."""
    return output.model_copy(update={"stats": output.stats.model_copy(update={"queued_s": None})})


@pytest.mark.parametrize("options", [{}, {"disable_fused_commit": True}, {"max_total_tokens": 160}])
def test_the_same_is_told(tiny_checkpoint: Path, options: dict[str, Any]) -> None:
    """With room for all, without, and where requests have to be retracted."""
    plain, overlapped = (engine_with(tiny_checkpoint, how, **options) for how in ("off", "on"))
    assert overlapped.engine.info()["overlap_schedule"] and not plain.engine.info()["overlap_schedule"]
    text = told(plain, wishes())["0"]
    stop = "".join(output.text for output in text)[18:21]
    assert plain.engine.flush_cache()
    want, got = (told(llm, wishes(stop)) for llm in (plain, overlapped))
    for rid, outputs in want.items():
        if "max_total_tokens" in options:
            # Who has to give way, and so who finds what in the cache, is a matter of time.
            def essence(some: list[RequestOutput]) -> Any:
                return [(o.text, o.token_ids, o.finish, o.trace) for o in some if o.text or o.finish]

            assert essence(got[rid]) == essence(outputs)
        else:
            assert [timeless(o) for o in got[rid]] == [timeless(o) for o in outputs]
    finish = want["0"][-1].finish
    assert finish is not None and finish.matched == stop and overlapped.engine.stats()["dropped_results"]
    assert plain.engine.stats()["dropped_results"] == 0


def test_one_forward_is_in_flight_between_steps(tiny_checkpoint: Path) -> None:
    llm = engine_with(tiny_checkpoint, "on")
    engine = llm.engine
    engine.add(Request(rid="r", prompt_ids=tuple(PROMPTS[0]), sampling=SamplingParams(max_new_tokens=8)))
    assert engine.step() == [] and engine.forwards == 0 and engine.has_work() and not engine.flush_cache()
    engine.step()
    assert engine.forwards == 1
    assert engine.abort("r") and engine.has_work()
    outputs = engine.step()
    assert [o.finish.type for o in outputs if o.finish] == ["abort"] and engine.stats()["dropped_results"] == 1
    assert not engine.has_work() and engine.flush_cache()


def test_a_forward_whose_request_has_ended_is_waited_for(tiny_checkpoint: Path) -> None:
    llm = engine_with(tiny_checkpoint, "on")
    engine = llm.engine
    [request] = wishes("a")[:1]
    letter = SamplingParams(**{**request.sampling.model_dump(), "logit_bias": {97: 1000.0}})
    engine.add(request.model_copy(update={"sampling": letter}))
    outputs: list[RequestOutput] = []
    while not any(output.finish for output in outputs):
        outputs += engine.step()
    assert outputs[-1].finish is not None and outputs[-1].finish.matched == "a"
    assert not engine.scheduler.has_work and engine.has_work() and not engine.flush_cache()
    assert engine.step() == [] and not engine.has_work() and engine.stats()["dropped_results"] == 2
    engine.rest()


def test_a_device_that_raises_when_it_is_waited_for(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is undone when its results are asked for; nobody pays for a fault that passes."""
    llm = engine_with(tiny_checkpoint, "on")
    params = SamplingParams(temperature=0.0, max_new_tokens=40, ignore_eos=True)
    want = [answer.token_ids for answer in llm.generate(PROMPTS, params)]
    model = type(llm.engine.parts.runner.model)
    original, calls = model.logits, iter(range(10**6))

    def struck(self: Any, hidden: Tensor) -> Tensor:
        if next(calls) in (2, 40):
            raise RuntimeError("the device failed")
        out: Tensor = original(self, hidden)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", struck)
        assert [answer.token_ids for answer in llm.generate(PROMPTS, params)] == want
    assert llm.engine.undone == 2


def test_a_fault_in_a_forward_whose_requests_have_all_ended(tiny_checkpoint: Path, monkeypatch: Any) -> None:
    """Nobody is left to be blamed; the engine answers, so it goes on."""
    llm = engine_with(tiny_checkpoint, "on")
    engine = llm.engine
    params = SamplingParams(temperature=0.0, max_new_tokens=40, ignore_eos=True)
    engine.add(Request(rid="r", prompt_ids=tuple(PROMPTS[0]), sampling=params))
    engine.step()
    flight = engine._flight
    assert flight is not None

    def fails() -> Any:
        raise RuntimeError("the device failed")

    engine._flight = flight._replace(wait=fails)
    engine.abort("r")
    assert [o.finish.type for o in engine.step() if o.finish] == ["abort"]
    assert engine.undone == 1 and not engine.has_work()
    assert llm.generate(PROMPTS[:1], params)[0].finish.type == "length"

"""Constrained requests beside all else that a request may ask: the output still matches, alone or in company."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.request import Request, RequestOutput
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.engine import Engine
from losa_runtime.grammar.compiler import Compiler
from losa_runtime.grammar.guide import Guides
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from losa_runtime.runner import token_grammars
from losa_runtime.runner.token_grammars import TokenGrammars
from tests.grammar.test_engine import ALGORITHMS, run

CODE = "(?:[a-z]{2,9}[ ,]){2,6}[0-9]{1,3}"
MODES = ("map", "valid")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder: Path = tmp_path_factory.mktemp("model")
    write_random_checkpoint(folder, preset="tiny", seed=5)
    return Engine(EngineConfig(model=str(folder), max_total_tokens=4096, max_running_requests=16, show_progress=False))


def wanted(mode: str, algorithm: str = "low_confidence_dynamic", **more: Any) -> dict[str, Any]:
    custom = {"grammar_mode": mode, "algorithm": algorithm} | more.pop("custom_params", {})
    return {"regex": CODE, "max_new_tokens": 70, "custom_params": custom} | more


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_same_seed_gives_the_same_alone_and_in_company(
    engine: Engine, mode: str, algorithm: str, temperature: float
) -> None:
    mine = ("hello", wanted(mode, algorithm, temperature=temperature, sampling_seed=7))
    engine.flush_cache()
    [alone] = run(engine, [mine])
    rng = random.Random(1)
    others = [
        ("h" * (i + 1), wanted(rng.choice(MODES), rng.choice(ALGORITHMS), sampling_seed=i, temperature=1.0))
        if i % 2
        else ("free" * (i + 1), {"max_new_tokens": 40, "temperature": 1.0, "sampling_seed": i})
        for i in range(6)
    ]
    together = run(engine, [*others[:3], mine, *others[3:], mine])
    assert alone.text == together[3].text == together[7].text
    assert re.fullmatch(CODE, alone.text)
    assert all(re.fullmatch(CODE, output.text) for output in together[1:3:2])
    if temperature:
        [another] = run(engine, [("hello", mine[1] | {"sampling_seed": 8})])
        assert another.text != alone.text


@pytest.mark.parametrize("mode", MODES)
def test_a_cached_prefix_changes_nothing(engine: Engine, mode: str) -> None:
    mine = ("a long beginning " * 4, wanted(mode, temperature=1.0, sampling_seed=3))
    engine.flush_cache()
    [cold], [warm] = run(engine, [mine]), run(engine, [mine])
    assert cold.cached_tokens == 0 < warm.cached_tokens
    assert cold.text == warm.text


@pytest.mark.parametrize("method", ["quest", "losa", "losa_plus"])
def test_with_sparse_attention(engine: Engine, method: str) -> None:
    custom = {"sparse_method": method, "token_budget": 16}
    requests = [("far and wide " * 20, wanted(mode, custom_params=custom, temperature=0.5)) for mode in MODES]
    assert all(re.fullmatch(CODE, output.text) for output in run(engine, requests))


@pytest.mark.parametrize(
    "more",
    [
        {"stop": ["e", "ab", "zz"]},
        {"stop_token_ids": [ord("a"), ord("7")]},
        {"stop_token_ids": [ord(" ")], "stop": "q"},
        {"logit_bias": {str(ord("a")): 1e4}},
        {"logit_bias": {str(ord("!")): 1e4, str(ord("5")): -1e4}},
        {"logit_bias": {"258": 1e4}},  # the end, at once
        {"logit_bias": {"258": -1e4}},
        {"frequency_penalty": 2.0, "presence_penalty": 2.0, "repetition_penalty": 2.0},
        {"frequency_penalty": -2.0, "repetition_penalty": 0.01},
        {"top_k": 1, "temperature": 3.0},
        {"top_p": 1e-6, "temperature": 3.0},
        {"min_p": 1.0, "temperature": 3.0},
        {"temperature": 100.0},
        {"skip_special_tokens": False},
        {"max_new_tokens": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_that_a_request_may_ask_breaks_the_match(engine: Engine, mode: str, more: dict[str, Any]) -> None:
    asked = wanted(mode, temperature=1.0) | more
    for output in run(engine, [("x" * i, asked | {"sampling_seed": i}) for i in range(1, 5)]):
        assert re.fullmatch(CODE, output.text), output
        stops = [asked["stop"]] if isinstance(asked.get("stop"), str) else asked.get("stop", [])
        assert not any(stop in output.text for stop in stops)
        assert output.finish is not None and output.finish.type in ("stop", "length")


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_token_ends_an_output_only_where_it_may_end(engine: Engine, mode: str) -> None:
    """A digit that ends outputs never stands in one, so these are all letters, up to where the pattern is fulfilled."""
    digits = list(range(ord("0"), ord("9") + 1))
    asked = wanted(mode, temperature=1.0, regex="[a-z0-9]{5,60}", stop_token_ids=digits)
    for output in run(engine, [("x" * i, asked | {"sampling_seed": i}) for i in range(1, 9)]):
        assert re.fullmatch("[a-z]{5,60}", output.text)


@pytest.mark.parametrize("mode", MODES)
def test_a_neighbour_that_leaves_changes_nothing(engine: Engine, mode: str) -> None:
    stays = wanted(mode, temperature=1.0, sampling_seed=2)
    [alone] = run(engine, [("stays", stays)])
    ids = {name: tuple(engine.parts.tokenizer.encode(name)) for name in ("stays", "leaves")}
    for name in ids:
        sampling = SamplingParams.parse(stays)
        engine.add(Request(rid=name, prompt_ids=ids[name], sampling=sampling))
    engine.step()
    engine.step()
    engine.abort("leaves")
    outputs: list[RequestOutput] = []
    while engine.has_work():
        outputs += engine.step()
    ends = {output.rid: output.finish.type for output in outputs if output.finish is not None}
    assert ends["leaves"] == "abort"
    assert "".join(output.text for output in outputs if output.rid == "stays") == alone.text


@pytest.mark.parametrize("mode", MODES)
def test_log_probabilities_are_the_models_own(engine: Engine, mode: str) -> None:
    ids = tuple(engine.parts.tokenizer.encode("hello"))
    sampling = SamplingParams.parse(wanted(mode, temperature=0.0))
    about = {"output_logprobs": True, "top_logprobs": 3, "logprob_ids": (65,)}
    engine.add(Request.model_validate({"rid": "r", "prompt_ids": ids, "sampling": sampling} | about))
    outputs: list[RequestOutput] = []
    while engine.has_work():
        outputs += engine.step()
    values = [value for output in outputs for value in output.output_logprobs or ()]
    assert len(values) == sum(len(output.token_ids) for output in outputs) > 0
    # Whatever random weights want, it is not this: the most likely token is hardly ever the one that had to be taken.
    assert all(-100 < value < 0 for value in values) and sum(values) / len(values) < -2


def test_outputs_of_a_model_that_wants_the_end_are_as_short_as_may_be(engine: Engine) -> None:
    asked = wanted("map", temperature=0.0, regex="[a-z]{7,}", logit_bias={"258": 50.0})
    [output] = run(engine, [("x", asked)])
    assert re.fullmatch("[a-z]{7}", output.text)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("native", [True, False])
def test_too_many_ways_through_a_block_end_their_own_request(
    engine: Engine, mode: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.flush_cache()
    [calm] = run(engine, [("hello", wanted(mode, temperature=0))])
    monkeypatch.setattr(token_grammars, "LIMITS", token_grammars.LIMITS._replace(bytes=1000))
    monkeypatch.setattr(
        engine, "_guides", Guides(TokenGrammars(engine._text_of_ids, native), Compiler(time_limit_s=60))
    )
    late = "[a-z]{17}" + "".join(f"[a-{last}]" for last in "klmnopqrstuvwxyz")  # each with other tokens
    mine, other = ("hello", wanted(mode, temperature=0)), ("hi", wanted(mode, regex=late, temperature=0))
    undone = engine.undone
    [fine, refused, free] = run(engine, [mine, other, ("free", {"max_new_tokens": 40, "temperature": 0})])
    assert fine.text == calm.text
    assert free.finish is not None and free.finish.type in ("length", "stop")
    assert refused.finish is not None and (refused.finish.type, refused.finish.status_code) == ("error", 400)
    assert "too many ways through one block" in (refused.finish.message or "")
    assert re.fullmatch("[a-z]{1,19}", refused.text), "the first block was fine"
    assert engine.undone == undone
    engine.parts.cache.check()

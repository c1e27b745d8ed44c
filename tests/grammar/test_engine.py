"""Constrained requests through the whole engine, on random models: the worst case, as they want anything else."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.request import Request, RequestOutput
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.decoding import registry
from losa_runtime.engine import Engine
from losa_runtime.grammar.guide import Guides
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from losa_runtime.runner.token_grammars import TokenGrammars
from tests.grammar.patterns import random_pattern
from tests.grammar.schemas import REALISTIC, SCHEMAS

ALGORITHMS = tuple(registry.ALGORITHMS)


@pytest.fixture(scope="module", params=[16, 4])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_random_checkpoint(folder, preset="tiny", seed=5, block_size=request.param)
    return Engine(EngineConfig(model=str(folder), max_total_tokens=4096, max_running_requests=16, show_progress=False))


def run(engine: Engine, requests: list[tuple[str, dict[str, Any]]]) -> list[RequestOutput]:
    """All together; per request, one output with all of its text."""
    for i, (prompt, params) in enumerate(requests):
        ids = tuple(engine.parts.tokenizer.encode(prompt))
        engine.add(Request(rid=str(i), prompt_ids=ids, sampling=SamplingParams.parse(params)))
    texts, ends = dict.fromkeys(map(str, range(len(requests))), ""), dict[str, RequestOutput]()
    while engine.has_work():
        for output in engine.step():
            texts[output.rid] += output.text
            if output.finish is not None:
                ends[output.rid] = output
    return [ends[rid].model_copy(update={"text": texts[rid]}) for rid in texts]


def wish(rng: random.Random, **constraint: Any) -> dict[str, Any]:
    """A constrained request with random other parameters."""
    custom = {"grammar_mode": rng.choice(["map", "valid", None]), "algorithm": rng.choice(ALGORITHMS)}
    if rng.random() < 0.5:
        custom["denoising_steps"] = rng.randint(1, 4)
    sampling = {
        "temperature": rng.choice([0, 1.0, 3.0]),
        "top_k": rng.choice([-1, 3]),
        "top_p": rng.choice([1.0, 0.5]),
        "repetition_penalty": rng.choice([1.0, 1.5]),
        "sampling_seed": rng.randint(0, 9999),
        "max_new_tokens": rng.choice([5, 16, 40]),
    }
    return {**sampling, **constraint, "custom_params": {k: v for k, v in custom.items() if v is not None}}


def least_length(engine: Engine, params: dict[str, Any]) -> int | None:
    """What a refusal says that a request needs; None if it is not refused."""
    try:
        engine._settle(Request(rid="-", prompt_ids=(1,), sampling=SamplingParams.parse(params)))
    except InvalidRequest as refusal:
        found = re.search(r"max_new_tokens: found \d+, allowed: at least (\d+)", str(refusal))
        if found is None:
            raise
        return int(found.group(1))
    return None


def check_patterns(engine: Engine, seed: int, count: int) -> None:
    """Whatever its end, an admitted request matches; one that is refused names the least length, and that one fits."""
    rng = random.Random(seed)
    admitted: list[tuple[str, dict[str, Any]]] = []
    while len(admitted) < count:
        params = wish(rng, regex=random_pattern(rng))
        least = least_length(engine, params)
        if least is not None:
            assert least > params["max_new_tokens"] and least_length(engine, params | {"max_new_tokens": least}) is None
            params = params | {"max_new_tokens": least}
        admitted.append(("x" * rng.randint(1, 20), params))
    for first in range(0, count, 48):
        part = admitted[first : first + 48]
        for (_, params), output in zip(part, run(engine, part), strict=True):
            assert output.finish is not None and output.finish.type in ("stop", "length")
            assert re.fullmatch(params["regex"], output.text), (params, output)


def test_whatever_the_model_wants_its_output_matches(engine: Engine) -> None:
    check_patterns(engine, seed=1, count=48)


@pytest.mark.slow
def test_two_thousand_patterns(engine: Engine) -> None:
    check_patterns(engine, seed=2, count=1000)


def test_realistic_schemas(engine: Engine) -> None:
    rng = random.Random(3)
    requests = [
        ("x", wish(rng, json_schema=json.dumps(schema)) | {"max_new_tokens": 160}) for schema in REALISTIC.values()
    ]
    for schema, output in zip(REALISTIC.values(), run(engine, requests), strict=True):
        jsonschema.Draft202012Validator(schema).validate(json.loads(output.text))


@pytest.mark.slow
@given(st.lists(SCHEMAS, min_size=25, max_size=25), st.integers(0, 1000))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_five_hundred_schemas(engine: Engine, schemas: list[Any], seed: int) -> None:
    rng, requests = random.Random(seed), []
    for schema in schemas:
        params = wish(rng, json_schema=json.dumps(schema)) | {"max_new_tokens": rng.choice([20, 60])}
        least = least_length(engine, params)
        requests.append(("x", params if least is None else params | {"max_new_tokens": least}))
    for schema, output in zip(schemas, run(engine, requests), strict=True):
        jsonschema.Draft202012Validator(schema).validate(json.loads(output.text))


def test_retraction_and_a_full_pool_change_nothing(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, preset="tiny", seed=5)
    options = {"model": str(tmp_path), "max_running_requests": 8, "show_progress": False}
    roomy = Engine(EngineConfig(**options, max_total_tokens=4096))
    narrow = Engine(EngineConfig(**options, max_total_tokens=288, disable_radix_cache=True))
    params = {"regex": "(?:[a-z]{4,9} ){12,20}[0-9]+", "max_new_tokens": 150, "temperature": 1.0}
    requests = [("x" * (i + 1), params | {"sampling_seed": i}) for i in range(8)]
    together, cut = run(roomy, requests), run(narrow, requests)
    assert sum(output.stats.retractions for output in cut) > 0
    assert [output.text for output in cut] == [output.text for output in together]
    assert all(re.fullmatch(str(params["regex"]), output.text) for output in cut)


def test_neighbours_without_a_grammar_are_not_touched(engine: Engine) -> None:
    free = ("hello", {"temperature": 1.0, "sampling_seed": 3, "max_new_tokens": 20})
    bound = ("hello", {"temperature": 1.0, "sampling_seed": 3, "max_new_tokens": 20, "regex": "[a-z]{3,30}"})
    [alone] = run(engine, [free])
    together = run(engine, [bound, free, bound])
    assert together[1].text == alone.text
    assert together[0].text == together[2].text and re.fullmatch("[a-z]{3,30}", together[0].text)


def test_without_the_kernels_the_same_is_written(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    requests = [("x" * (i + 1), wish(rng, regex=random_pattern(rng)) | {"max_new_tokens": 40}) for i in range(12)]
    requests = [request for request in requests if least_length(engine, request[1]) is None]
    found = [output.text for output in run(engine, requests)]
    monkeypatch.setattr(engine, "_guides", Guides(TokenGrammars(engine._text_of_ids, native=False)))
    assert [output.text for output in run(engine, requests)] == found


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"regex": "("}, "sampling_params.regex"),
        ({"regex": "a(?=b)"}, "sampling_params.regex"),
        ({"regex": "[a-z]{200}", "max_new_tokens": 3}, "sampling_params.max_new_tokens"),
        ({"json_schema": "{"}, "sampling_params.json_schema"),
        ({"json_schema": {"type": "integer", "multipleOf": 2}}, "sampling_params.json_schema.multipleOf"),
        ({"regex": "a", "json_schema": "{}"}, "sampling_params.json_schema"),
        ({"regex": "a", "ignore_eos": True}, "sampling_params.ignore_eos"),
        ({"regex": "a", "min_new_tokens": 2}, "sampling_params.min_new_tokens"),
        ({"regex": "a", "no_stop_trim": True}, "sampling_params.no_stop_trim"),
        ({"regex": "a+", "stop": "a"}, "sampling_params.regex"),
        ({"regex": "[a-z]{3}", "max_new_tokens": 0}, "sampling_params.max_new_tokens"),
        ({"regex": "a", "custom_params": {"grammar_mode": "best"}}, "sampling_params.custom_params.grammar_mode"),
    ],
)
def test_what_cannot_be_served_is_refused(engine: Engine, params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        engine.add(Request(rid="r", prompt_ids=(1,), sampling=SamplingParams.parse(params)))
    assert refusal.value.field == field

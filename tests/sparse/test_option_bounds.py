"""No option of any method ends an engine: what is out of bounds is refused by name, and what is allowed is served."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import MAX_COUNT, SamplingParams
from losa_runtime.sparse.method import METHODS, method_class
from losa_runtime.sparse.resolve import resolve
from losa_runtime.sparse.sparse_dllm import kept_tokens
from tests.sparse.stage import Sizes, Stage, params

PROMPT = 96
OPTIONS = [(name, field) for name in METHODS for field in method_class(name).Options.model_fields]
ODD: list[Any] = [2**31 + 1, 2**63 - 1, 10**30, 10**400, -1, math.nan, math.inf, -math.inf, True, "", "1", 0.5, 1e308]


def ask(custom: dict[str, Any]) -> Any:
    """The settled parameters, as a request gets them. Raises InvalidRequest."""
    config = EngineConfig.parse(model="m")
    return resolve(SamplingParams.parse({"custom_params": custom}).custom_params, config, Stage(Sizes()).geometry)


def refusal(custom: dict[str, Any]) -> str | None:
    """The field that is refused."""
    try:
        ask(custom)
    except InvalidRequest as refused:
        return refused.field
    return None


@pytest.mark.parametrize(("method", "field"), OPTIONS)
def test_values_are_refused_by_name_or_served(method: str, field: str) -> None:
    """Also the extreme values that the bounds allow are computed, and soon."""
    begun = time.monotonic()
    for value in [*ODD, 0, 1, 5e-324, 1023, 1024, MAX_COUNT]:
        refused = refusal({"sparse_method": method, "sparse_options": {field: value}})
        if refused is not None:
            assert refused == f"custom_params.sparse_options.{field}"
            continue
        stage, sparse = Stage(), params(method, 16, **{field: value})
        stage.prefill("r", PROMPT)
        assert len(stage.denoise("r", PROMPT, sparse, 3)) == 3
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(("method", "field"), OPTIONS)
def test_counts_end_somewhere(method: str, field: str) -> None:
    option = method_class(method).Options.model_fields[field]
    assert option.default is not PydanticUndefined
    if option.annotation in (int, int | None):
        with pytest.raises(InvalidRequest, match=rf"sparse_options\.{field}: found {2**31}"):
            ask({"sparse_method": method, "sparse_options": {field: 2**31}})


@pytest.mark.parametrize("value", [[], {}, [1], {"a": 1}])
def test_values_that_are_no_values_are_refused_under_the_options_name(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask({"sparse_method": "losa_plus", "sparse_options": {"spread": 2, "tolerance": value}})
    assert caught.value.field == "custom_params.sparse_options.tolerance" and caught.value.found == value
    assert caught.value.allowed == "a number, a text, true or false"


def test_null_is_the_default() -> None:
    settled = ask({"sparse_method": "sparsed", "sparse_options": {"keep_ratio": None, "block_size": 8}})
    assert settled.options.model_dump(exclude_unset=True) == {"block_size": 8}


@pytest.mark.parametrize("ratio", [1e-12, 5e-324])
@pytest.mark.parametrize("method", ["sparse_dllm", "sparsed"])
def test_a_tiny_share_keeps_something(method: str, ratio: float) -> None:
    stage = Stage()
    stage.prefill("r", PROMPT)
    reports = [result.report for result in stage.denoise("r", PROMPT, params(method, 16, keep_ratio=ratio), 4)]
    assert reports[-1] is not None and reports[-1].kv_bytes > 0
    assert kept_tokens(ratio, PROMPT) == 1


@pytest.mark.parametrize("method", ["sparse_dllm", "sparsed"])
def test_a_budget_beside_a_share_is_refused(method: str) -> None:
    """One of them would be ignored."""
    share = {"sparse_method": method, "sparse_options": {"keep_ratio": 0.5}}
    assert ask(share).options.keep_ratio == 0.5
    with pytest.raises(
        InvalidRequest, match=r"token_budget: found 16, allowed: absent beside sparse_options\.keep_ratio"
    ):
        ask(share | {"token_budget": 16})


def test_statistics_never_outgrow_the_keys() -> None:
    """BA-Att keeps two float32 vectors per key block: with tiny key blocks more than the K/V themselves."""
    with pytest.raises(InvalidRequest, match=r"sparse_options\.block_size: found 7, allowed: at least 8"):
        ask({"sparse_method": "ba_att", "sparse_options": {"block_size": 7}})
    assert ask({"sparse_method": "ba_att", "sparse_options": {"block_size": 8}}).options.block_size == 8

"""From wishes to settled parameters: defaults, precedence and refusals that say what would be allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from losa_runtime.cache.kv_pool import Summary
from losa_runtime.core.batch import ActiveRule, SparseParams
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import ConfigError, InvalidRequest
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.memory import Geometry
from losa_runtime.sparse.method import METHODS, SparseMethod, method_class
from losa_runtime.sparse.resolve import default_active_tokens, kept_summaries, resolve

GEOMETRY = Geometry(
    2, 4, 2, 8, block_length=16, page_size=16, max_slots=4, context_length=4096, device=torch.device("cpu")
)


def settled(wanted: dict[str, Any] | None = None, **config: Any) -> SparseParams:
    return resolve(DiffusionParams(**(wanted or {})), EngineConfig.parse(model="m", **config), GEOMETRY)


def sparse(method: str, budget: int, active: ActiveRule) -> SparseParams:
    return SparseParams(method, budget, active, method_class(method).Options(), 16)


def test_table_names_lead_to_methods_of_this_package() -> None:
    for name, place in METHODS.items():
        assert place.startswith(f"losa_runtime.sparse.{name}:") and issubclass(method_class(name), SparseMethod)


@pytest.mark.parametrize(("block", "count"), [(1, 1), (4, 1), (8, 2), (16, 5), (32, 10), (64, 20)])
def test_default_active_tokens(block: int, count: int) -> None:
    assert default_active_tokens(block) == count


def test_defaults_and_precedence() -> None:
    assert settled() == sparse("dense", 1024, ActiveRule("ratio", 1.0))
    assert settled({"sparse_method": "losa"}) == sparse("losa", 1024, ActiveRule("count", 5))
    assert settled({"denoising_steps": 4}, denoising_steps=8).planned_steps == 4
    assert settled(denoising_steps=8).planned_steps == 8
    assert settled({"sparse_method": "quest", "token_budget": 64}).token_budget == 64
    assert settled(sparse_method="losa", active_ratio=0.5, token_budget=32) == sparse(
        "losa", 32, ActiveRule("ratio", 0.5)
    )
    assert settled({"active_tau": 0.5}, sparse_method="losa", active_tokens=3).active == ActiveRule("tau", 0.5)
    assert settled({"active_tokens": 0}, sparse_method="losa").active == ActiveRule("count", 0)
    assert settled({"sparse_method": "quest"}, sparse_method="losa", active_tokens=3).active == ActiveRule("ratio", 1.0)


@pytest.mark.parametrize(
    ("wanted", "field", "allowed"),
    [
        ({"sparse_method": "sparsest"}, "sparse_method", "dense, quest, losa, "),
        ({"sparse_method": "losa", "token_budget": 100}, "token_budget", "e.g. 96 or 112"),
        ({"sparse_method": "quest", "token_budget": 3}, "token_budget", "e.g. 16"),
        ({"sparse_method": "losa", "active_tokens": 17}, "active_tokens", "at most the block length 16"),
        ({"sparse_method": "quest", "active_tokens": 3}, "active_tokens", "absent"),
        ({"sparse_method": "quest", "active_ratio": 0.5}, "active_ratio", "absent"),
        ({"active_tau": 0.5}, "active_tau", "absent"),
        ({"token_budget": 64}, "token_budget", "absent"),
        ({"sparse_method": "losa", "token_budget": 8192}, "token_budget", "at most the context length 4096"),
        ({"sparse_method": "dense", "sparse_options": {"speed": 9}}, "sparse_options", "'dense' has no options"),
        ({"sparse_method": "losa_plus", "sparse_options": {"speed": 9}}, "sparse_options", "tolerance, novelty"),
        ({"sparse_method": "losa_plus", "sparse_options": {"tolerance": -1.0}}, "sparse_options", "greater than"),
        ({"sparse_method": "losa_plus", "sparse_options": {"granule": "word"}}, "sparse_options", "'token' or 'page'"),
    ],
)
def test_refusals_of_requests(wanted: dict[str, Any], field: str, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        settled(wanted)
    value = wanted[field]
    if isinstance(value, dict):
        [(name, value)] = value.items()
        field = f"{field}.{name}"
    assert caught.value.field == f"custom_params.{field}"
    assert caught.value.found == value and allowed in caught.value.allowed


def test_methods_that_are_not_offered_are_refused_with_the_reason() -> None:
    few = {"sparse_methods": ("dense", "mage")}
    assert settled({"sparse_method": "mage"}, **few).method == "mage"
    with pytest.raises(InvalidRequest, match=r"allowed: dense, mage .*'quest'.*its pages keep no key_bounds"):
        settled({"sparse_method": "quest"}, **few)
    with pytest.raises(InvalidRequest, match=r"without 'flashblock' in sparse_methods\)$"):
        settled({"sparse_method": "flashblock"}, **few)
    with pytest.raises(ConfigError, match="sparse_method: found 'dense', allowed: mage"):
        settled(sparse_methods=("mage",))
    with pytest.raises(ConfigError, match="sparse_methods: found 'sparsest'"):
        settled(sparse_methods=("dense", "sparsest"))


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({}, {Summary.KEY_BOUNDS}),
        ({"sparse_method": "losa"}, {Summary.KEY_BOUNDS}),
        ({"sparse_method": "ba_att"}, set(Summary)),
        ({"sparse_methods": ("dense", "ba_att")}, {Summary.KEY_MOMENTS}),
        ({"sparse_methods": tuple(METHODS)}, set(Summary)),
        ({"sparse_methods": ("dense", "mage")}, set()),
    ],
)
def test_pages_keep_what_is_needed_and_what_helps_a_method_that_is_named(
    config: dict[str, Any], kept: set[Summary]
) -> None:
    assert kept_summaries(EngineConfig.parse(model="m", **config)) == kept


def test_options_of_the_engine_belong_to_its_method() -> None:
    engine = {"sparse_method": "losa_plus", "sparse_options": {"tolerance": 0.2, "granule": "page"}}
    assert settled(**engine).options.model_dump(exclude_unset=True) == {"tolerance": 0.2, "granule": "page"}
    own = settled({"sparse_options": {"tolerance": 0.3}}, **engine).options
    assert own.model_dump(exclude_unset=True) == {"tolerance": 0.3, "granule": "page"}
    assert settled({"sparse_method": "losa"}, **engine).options.model_dump(exclude_unset=True) == {}


def test_the_default_budget_fits_the_context() -> None:
    short = GEOMETRY._replace(context_length=250)
    config = EngineConfig.parse(model="m", sparse_method="quest")
    assert resolve(DiffusionParams(), config, short).token_budget == 240
    with pytest.raises(InvalidRequest, match="token_budget: found 256, allowed: at most the context length 250"):
        resolve(DiffusionParams(token_budget=256), config, short)


def test_a_methods_own_check_blames_the_configuration_if_the_request_wished_nothing() -> None:
    engine = {"sparse_method": "mage", "sparse_options": {"dense_layers": 2}}
    with pytest.raises(ConfigError, match=r"sparse_options\.dense_layers"):
        settled(**engine)
    with pytest.raises(InvalidRequest, match=r"sparse_options\.dense_layers"):
        settled(engine)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sparse_method": "sparsest"}, "sparse_method: found 'sparsest', allowed: dense, quest, losa, "),
        ({"token_budget": 100}, "token_budget: found 100"),
        ({"active_tokens": 20}, "active_tokens: found 20"),
        ({"active_tokens": 2, "active_tau": 0.5}, "at most one of the three"),
    ],
)
def test_refusals_of_configurations(config: dict[str, Any], message: str) -> None:
    """Found with a request that wishes for nothing, so at the start of an engine, whatever its default method."""
    with pytest.raises(ConfigError, match=message):
        settled(**config)

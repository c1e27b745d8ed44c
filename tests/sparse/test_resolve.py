"""From wishes to settled parameters: defaults, precedence and refusals that say what would be allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from losa_runtime.core.batch import ActiveRule, SparseParams
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import ConfigError, InvalidRequest
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.memory import Geometry
from losa_runtime.sparse.method import METHODS, SparseMethod, method_class
from losa_runtime.sparse.resolve import default_active_tokens, resolve

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
        ({"sparse_method": "sparsest"}, "sparse_method", "dense, quest, losa"),
        ({"sparse_method": "losa", "token_budget": 100}, "token_budget", "e.g. 96 or 112"),
        ({"sparse_method": "quest", "token_budget": 3}, "token_budget", "e.g. 16"),
        ({"sparse_method": "losa", "active_tokens": 17}, "active_tokens", "at most the block length 16"),
        ({"sparse_method": "quest", "active_tokens": 3}, "active_tokens", "absent"),
        ({"sparse_method": "quest", "active_ratio": 0.5}, "active_ratio", "absent"),
        ({"active_tau": 0.5}, "active_tau", "absent"),
        ({"token_budget": 64}, "token_budget", "absent"),
    ],
)
def test_refusals_of_requests(wanted: dict[str, Any], field: str, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        settled(wanted)
    assert caught.value.field == f"custom_params.{field}"
    assert caught.value.found == wanted[field] and allowed in caught.value.allowed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sparse_method": "sparsest"}, "sparse_method: found 'sparsest', allowed: dense, quest, losa"),
        ({"token_budget": 100}, "token_budget: found 100"),
        ({"active_tokens": 20}, "active_tokens: found 20"),
        ({"active_tokens": 2, "active_tau": 0.5}, "at most one of the three"),
    ],
)
def test_refusals_of_configurations(config: dict[str, Any], message: str) -> None:
    """Found with a request that wishes for nothing, so at the start of an engine, whatever its default method."""
    with pytest.raises(ConfigError, match=message):
        settled(**config)

"""Backends that every test runs on, and the block and page sizes that every method has to serve."""

from __future__ import annotations

import pytest

from tests.kernels.native import require_native
from tests.sparse import stage
from tests.sparse.stage import Sizes

SHAPES = {
    "page=block": Sizes(),
    "page=4blocks": Sizes(block=4, page=16),
    "block=2pages": Sizes(block=16, page=8, dim=8),
}


@pytest.fixture(params=["torch", "native"], autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native":
        require_native()
    monkeypatch.setattr(stage, "BACKEND", request.param)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def sizes(request: pytest.FixtureRequest) -> Sizes:
    """One proportion of block to page."""
    found: Sizes = request.param
    return found

"""Block and page sizes that every method has to serve."""

from __future__ import annotations

import pytest

from tests.sparse.stage import Sizes

SHAPES = {
    "page=block": Sizes(),
    "page=4blocks": Sizes(block=4, page=16),
    "block=2pages": Sizes(block=16, page=8, dim=8),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def sizes(request: pytest.FixtureRequest) -> Sizes:
    """One proportion of block to page."""
    found: Sizes = request.param
    return found

"""One fleet per router and module; routers that were not built are skipped (`make router-matrix` builds them)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.routers.fleet import Fleet
from tests.routers.recipes import ROUTERS


@pytest.fixture(scope="module", params=sorted(ROUTERS))
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two servers behind a router."""
    router = ROUTERS[request.param]
    if not router.built:
        pytest.skip(f"{router.name} is not in {router.folder.parent}: make router-matrix installs it there")
    with Fleet(router, tmp_path_factory.mktemp("fleet")) as running:
        yield running

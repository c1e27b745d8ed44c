"""Threads that wait for one another spin briefly in the engine's process, unless its user says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from losa_server.spinning import OWN_WORDS, SPINS, spins_briefly
from tests.server.server_process import ServerProcess


def test_the_engine_spins_briefly(tmp_path: Path, bundled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for word in OWN_WORDS:
        monkeypatch.delenv(word, raising=False)
    with ServerProcess("--model", bundled, tmp=tmp_path) as server:
        server.wait_ready()
        assert server.engine.environ()["GOMP_SPINCOUNT"] == str(SPINS)


@pytest.mark.parametrize("own", [{"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "active"}])
def test_a_users_own_words_stay(own: dict[str, str]) -> None:
    assert spins_briefly({"PATH": "/bin", **own}) == {"PATH": "/bin", **own}

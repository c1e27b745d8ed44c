"""The package is checked before anything relies on it, and nothing else imports it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from losa_runtime.attention.flashinfer_interface import load_wrapper
from losa_runtime.core.errors import ConfigError
from tests.attention.fake_flashinfer import FakeWrapper, install


def test_the_pinned_version_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert load_wrapper() is FakeWrapper


def test_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match=r"flashinfer-python: found no package .*needed: .*0\.6\.18\.post1"):
        load_wrapper()


@pytest.mark.parametrize("version", ["0.6.17", "0.7.2.post1", None])
def test_another_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, version)
    with pytest.raises(ConfigError, match=rf"found version {version}, needed: flashinfer-python 0\.6\.18\.post1"):
        load_wrapper()


def test_a_missing_class(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, wrapper=None)
    with pytest.raises(ConfigError, match="found no BatchPrefillWithPagedKVCacheWrapper"):
        load_wrapper()


def test_a_missing_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older(FakeWrapper):
        def run(self, q: object, paged_kv_cache: object, *, out: object, return_lse: bool) -> None:  # type: ignore[override]
            raise NotImplementedError

    install(monkeypatch, wrapper=Older)
    with pytest.raises(ConfigError, match=r"found no lse, enable_pdl in BatchPrefillWithPagedKVCacheWrapper\.run"):
        load_wrapper()


def test_it_is_imported_by_nobody_else() -> None:
    """It takes seconds; the backends must be importable where it is not installed."""
    code = (
        "import sys; sys.modules['flashinfer'] = None\n"
        "import losa_runtime.attention.flashinfer_attention, losa_runtime.assembly"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

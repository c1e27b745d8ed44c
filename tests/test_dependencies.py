"""Every declared dependency is there: a package that is missing fails here, it never makes another test be skipped."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Import names that differ from the distribution's name, and commands that have none (None).
IMPORT_NAMES = {
    "pyzmq": "zmq",
    "import-linter": "importlinter",
    "pytest-timeout": "pytest_timeout",
    "pytest-xdist": "xdist",
    "huggingface-hub": "huggingface_hub",
    "prometheus-client": "prometheus_client",
    "outlines-core": "outlines_core",
    "pyyaml": "yaml",
    "types-pyyaml": None,
    "opentelemetry-sdk": "opentelemetry.sdk",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry.exporter.otlp.proto.http",
    "ruff": None,
    "clang-format": None,
}
# Part of the public face of a declared package: fastapi is made of starlette.
CARRIED = {"starlette"}
# Rooms that are only entered where an extra is installed.
BEHIND_AN_EXTRA = {
    ROOT / "kernels" / "losa_kernels" / "triton": "cuda",
    ROOT / "losa_runtime" / "attention" / "device_backend.py": "cuda",
    ROOT / "server" / "losa_server" / "tracing.py": "otel",
    ROOT / "server" / "losa_server" / "bench" / "programs.py": "frontend",
}


def declared(*groups: list[str]) -> list[Requirement]:
    """What is needed on this platform."""
    requirements = [Requirement(line) for group in groups for line in group]
    return [r for r in requirements if r.name != PROJECT["name"] and (r.marker is None or r.marker.evaluate())]


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines) if pin}


NEEDED = declared(PROJECT["dependencies"], EXTRAS["frontend"], EXTRAS["otel"], EXTRAS["quantization"], EXTRAS["dev"])


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda r: r.name)
def test_is_installed_in_a_fitting_version(requirement: Requirement) -> None:
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda r: r.name)
def test_can_be_imported(requirement: Requirement) -> None:
    name = IMPORT_NAMES.get(canonicalize_name(requirement.name), requirement.name)
    if name is not None:
        import_module(name)


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda r: r.name)
def test_is_pinned_in_a_fitting_version(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)], prereleases=True)


def imports_of(path: Path) -> set[str]:
    """Roots of a file's absolute imports, without those inside a `try` that does without the package."""
    tree = ast.parse(path.read_text())
    optional = {
        inner
        for block in ast.walk(tree)
        if isinstance(block, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in block.handlers if h.type)
        for inner in ast.walk(block)
    }
    roots: set[str] = set()
    for node in ast.walk(tree):
        if node in optional:
            continue
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.split(".")[0])
    return roots


def import_names(group: list[str]) -> set[str]:
    """Import names of the packages of a group."""
    names = {canonicalize_name(r.name) for r in declared(group)}
    return {(IMPORT_NAMES.get(name) or name).split(".")[0] for name in names}


def test_what_the_packages_import_is_declared() -> None:
    """A package that merely happens to be installed here is missing on the next machine."""
    own = {"losa_runtime": "", "losa_kernels": "kernels", "losa_server": "server"}
    files = [path for name, folder in own.items() for path in (ROOT / folder / name).rglob("*.py")]
    assert len(files) > 60
    allowed = import_names(PROJECT["dependencies"]) | set(own) | CARRIED | sys.stdlib_module_names
    rooms = {folder: import_names(EXTRAS[extra]) for folder, extra in BEHIND_AN_EXTRA.items()}
    assert all(place.exists() for place in rooms)

    def allowed_in(path: Path) -> set[str]:
        return allowed.union(*(names for folder, names in rooms.items() if folder in (path, *path.parents)))

    missing = {str(p.relative_to(ROOT)): gone for p in files if (gone := imports_of(p) - allowed_in(p))}
    assert missing == {}


def test_dev_brings_the_frontend() -> None:
    assert "losa-runtime[frontend,otel,quantization]" in EXTRAS["dev"]


def test_pins_are_exact_and_name_no_place() -> None:
    text = (ROOT / "requirements" / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) > 50
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []

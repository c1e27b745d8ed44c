"""The programs of this folder with several releases of SGLang's frontend, each in an environment of its own.

`python -m tests.frontend.matrix` builds what is missing under build/frontends, starts one server of this tree with the
bundled model, runs the whole suite from every environment against it and prints a table. Exits with 1 if a program
failed. Later releases declare their whole server as a dependency, so those are installed without dependencies, beside
the few packages that the frontend really imports.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from losa_server.bench.running_server import RunningServer
from tests.frontend.conftest import CHECKPOINT, SERVER_OPTIONS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "frontends"
LIGHT = ("numpy", "tqdm", "pybase64", "requests", "ipython", "pydantic", "aiohttp")
# 0.5.23 imports torch, and triton even without a GPU. torchvision must stay out: a CUDA build of it breaks both.
HEAVY = (*LIGHT, "orjson", "psutil", "packaging", "pillow", "starlette", "msgspec", "pyzmq", "torch", "triton")
CPU_TORCH = "torch==2.13.0+cpu"  # where an index has it; else torch is the default build


class Recipe(NamedTuple):
    """alone: install the release without its dependencies. packages: what it needs beside."""

    alone: bool
    packages: tuple[str, ...]


RECIPES = {
    "0.4.10.post2": Recipe(False, ("pybase64", "pydantic")),
    "0.5.2": Recipe(False, ("pybase64", "pydantic")),
    "0.5.9": Recipe(True, LIGHT),
    "0.5.10.post1": Recipe(True, LIGHT),
    "0.5.23": Recipe(True, HEAVY),
}
LARGE = {"0.5.23"}  # over 2 GB


class Outcome(NamedTuple):
    """One run of the suite. failed: names of programs."""

    version: str
    programs: int
    failed: tuple[str, ...]
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Build, run, report; the exit code."""
    args = _arguments(argv)
    versions = args.versions or [v for v in RECIPES if args.large or v not in LARGE]
    console = Console()
    pythons = {version: environment(version, console) for version in versions}
    with RunningServer(str(CHECKPOINT), SERVER_OPTIONS) as server:
        outcomes = []
        for version, python in pythons.items():
            console.print(f"sglang {version}: running the programs", highlight=False)
            outcomes.append(run_suite(version, python, server.url, args.select))
    console.print(_table(outcomes))
    for outcome in outcomes:
        for name in outcome.failed:
            console.print(f"{outcome.version}: {name}", highlight=False, markup=False)
    return 1 if any(outcome.failed or not outcome.programs for outcome in outcomes) else 0


def environment(version: str, console: Console) -> Path:
    """The Python of a release's environment, which is built if it is not complete. Raises SystemExit."""
    folder = FOLDER / version
    python = folder / "bin" / "python"
    complete = folder / "complete"
    if complete.exists():
        return python
    console.print(f"sglang {version}: building {folder.relative_to(ROOT)}", highlight=False)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    recipe = RECIPES[version]
    if "torch" in recipe.packages:
        _install(folder, [CPU_TORCH], must=False)
    _install(folder, [*recipe.packages, "pytest", "pytest-timeout"])
    # Last, or pip would list all that is missing.
    _install(folder, [*(["--no-deps"] if recipe.alone else []), f"sglang=={version}"])
    complete.touch()
    return python


def _install(folder: Path, words: list[str], must: bool = True) -> None:
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    done = subprocess.run([*pip, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode and must:
        raise SystemExit(f"{folder.relative_to(ROOT)}: pip install {' '.join(words)} failed:\n{done.stdout[-2000:]}")


def run_suite(version: str, python: Path, url: str, select: str) -> Outcome:
    """All programs (or those that `select` names, as pytest's -k) from one environment against one server."""
    report = FOLDER / f"{version}.xml"
    report.unlink(missing_ok=True)
    # Only this folder's conftest: the one above it wants torch.
    command = [str(python), "-m", "pytest", "tests/frontend", "--confcutdir=tests/frontend", "-m", "slow", "-q"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", *(["-k", select] if select else [])]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env={**environ, "FRONTEND_SERVER_URL": url}, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - started
    if not report.exists():
        return Outcome(version, 0, (f"the suite did not run: {(done.stdout + done.stderr)[-2000:]}",), seconds)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [f"{case.get('name')}: {_reason(case)}" for case in cases if _reason(case)]
    return Outcome(version, len(cases), tuple(failed), seconds)


def _reason(case: ElementTree.Element) -> str:
    return " ".join((part.get("message") or part.tag) for part in case if part.tag in ("failure", "error", "skipped"))


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("sglang", "programs", "passed", "failed", "seconds", title="one server, several frontends")
    for version, programs, failed, seconds in outcomes:
        table.add_row(version, str(programs), str(programs - len(failed)), str(len(failed)), f"{seconds:.0f}")
    return table


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.frontend.matrix", description=__doc__)
    parser.add_argument("versions", nargs="*", choices=[[], *RECIPES], help="releases (default: all but the large)")
    parser.add_argument("--large", action="store_true", help=f"also {', '.join(LARGE)}, which brings torch (over 2 GB)")
    parser.add_argument("-k", dest="select", default="", metavar="EXPRESSION", help="only programs with these names")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

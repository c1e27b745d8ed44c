"""The house rules, kept by machine: who may import whom, where things lie, and what no code here does.

The rules about floors and forbidden imports are contracts in `.importlinter`; here are those that follow from the
code's own tables (registries, folders), and those that only a running process can show.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import permutations
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

from losa_runtime.attention.registry import BACKENDS
from losa_runtime.decoding.registry import ALGORITHMS
from losa_runtime.models.model import FAMILIES
from losa_runtime.sparse.method import METHODS

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "losa_runtime": ROOT / "losa_runtime",
    "losa_kernels": ROOT / "kernels" / "losa_kernels",
    "losa_server": ROOT / "server" / "losa_server",
}
SHIPPED = tuple(PACKAGES.values())
# Everything else in losa_server may be loaded by the HTTP process, so it must not reach torch.
ENGINE_SIDE = {"losa_server.engine_process"}
# Commands that work with a model in their own process import it when they are run, not when they are loaded.
OFFLINE = {
    "losa_server.chat.local",
    "losa_server.commands.chat",
    "losa_server.commands.env",
    "losa_server.commands.generate",
    "losa_server.commands.make_checkpoint",
    "losa_server.cli",
    "losa_server.__main__",
}
REGISTRIES: dict[str, Mapping[str, str | tuple[str, str]]] = {
    "losa_runtime.attention": BACKENDS,
    "losa_runtime.sparse": METHODS,
    "losa_runtime.models": FAMILIES,
    "losa_runtime.decoding": ALGORITHMS,
}


def source_files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from (p for p in sorted(folder.rglob("*.py")) if "runs" not in p.parts)


def all_source_files() -> list[Path]:
    files = list(source_files(*SHIPPED, ROOT / "tests", ROOT / "benchmarks"))
    assert len(files) > 60
    return files


@cache
def graph() -> grimp.ImportGraph:
    """Imports of the three packages, without the one that the runtime's face makes on first use only."""
    built = grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)
    built.remove_import(importer="losa_runtime", imported="losa_runtime.llm")
    return built


def entries() -> list[tuple[str, str, str, str]]:
    """(package, registered name, module, class) of every registry."""
    found = []
    for package, table in REGISTRIES.items():
        for name, entry in table.items():
            module, member = entry.split(":") if isinstance(entry, str) else entry
            found.append((package, name, module, member))
    return found


# --- imports ---------------------------------------------------------------------------------------------------------


def test_import_contracts_are_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    # Its configuration of logging switches off every logger there is, and later tests would see no log.
    monkeypatch.setattr("importlinter.cli._configure_logging", lambda verbose: None)
    code = lint_imports(config_filename=str(ROOT / ".importlinter"), no_cache=True, no_logo=True)
    assert code == 0, capsys.readouterr().out


def test_the_graph_sees_what_is_there() -> None:
    """Guards the contracts against keeping an empty house: every source file is a module, known chains are found."""
    modules = {
        ".".join((name, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        for name, folder in PACKAGES.items()
        for path in source_files(folder)
    }
    assert modules <= graph().modules
    for importer, imported in [
        ("losa_server.engine_process", "torch"),
        ("losa_runtime.engine", "losa_runtime.scheduler.scheduler"),
        ("losa_runtime.engine", "losa_runtime.runner.model_runner"),
        ("losa_server.launch", "losa_server.http.app"),
        ("losa_server.http.app", "fastapi"),
    ]:
        assert graph().chain_exists(importer, imported), f"{importer} no longer reaches {imported}"


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_package_folder_has_an_init(package: str) -> None:
    """A folder without one is silently left out of the import graph."""
    folders = {path.parent for path in source_files(PACKAGES[package])}
    assert folders
    assert [str(f) for f in folders if not (f / "__init__.py").exists()] == []


def test_test_folders_are_packages_too() -> None:
    folders = {path.parent for path in source_files(ROOT / "tests", ROOT / "benchmarks")}
    assert [str(f) for f in folders if not (f / "__init__.py").exists()] == []


@pytest.mark.parametrize(("package", "name", "module", "member"), entries())
def test_registry_entries_name_classes_of_their_own_package(package: str, name: str, module: str, member: str) -> None:
    assert module.startswith(f"{package}.")
    assert module in graph().modules
    tree = ast.parse(module_path(module).read_text())
    assert member in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("package", sorted(REGISTRIES))
def test_members_of_a_registry_are_strangers(package: str) -> None:
    """A method, backend, family or algorithm never imports another, not even by a detour."""
    members = {module for owner, _, module, _ in entries() if owner == package}
    assert members
    chains = [graph().find_shortest_chain(a, b) for a, b in permutations(sorted(members), 2)]
    assert [chain for chain in chains if chain] == []


def module_path(module: str) -> Path:
    root, *rest = module.split(".")
    path = PACKAGES[root].joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_what_the_http_process_may_load_never_reaches_torch() -> None:
    mine = {m for m in graph().modules if m.startswith("losa_server")} - ENGINE_SIDE - OFFLINE
    assert {"losa_server.http.app", "losa_server.launch", "losa_server.commands.serve"} <= mine
    for target in ("torch", "losa_kernels", "losa_runtime.engine"):
        chains = [graph().find_shortest_chain(m, target) for m in sorted(mine)]
        assert [chain for chain in chains if chain] == []


@pytest.mark.parametrize(
    "statement",
    [
        "import losa_runtime",
        "from losa_runtime import SamplingParams",
        "import losa_runtime.tokenizer",
        "import losa_runtime.decoding.registry",
        "import losa_runtime.scheduler.scheduler",
        "import losa_server.http.app",
        "import losa_server.launch",
        "import losa_server.cli",
    ],
)
def test_loads_no_torch(statement: str) -> None:
    code = f"{statement}\nimport sys\nsys.exit('torch was loaded' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- places and names ------------------------------------------------------------------------------------------------


def test_top_level_is_as_prescribed() -> None:
    prescribed = {"losa_runtime", "kernels", "server", "tests", "benchmarks"}
    left_by_tools = {"build", "dist"}
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))} - left_by_tools
    assert folders == prescribed | {"requirements"}
    assert (ROOT / "pyproject.toml").is_file()
    assert (ROOT / "Makefile").is_file()


def test_no_room_for_odds_and_ends() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    names = [p for p in all_source_files() if p.stem in vague or vague & set(p.relative_to(ROOT).parts)]
    assert names == []


def test_every_room_says_what_it_is_for() -> None:
    silent = [str(p) for p in source_files(*SHIPPED) if not ast.get_docstring(ast.parse(p.read_text()))]
    assert silent == []


# --- what no code here does ------------------------------------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler"}
UNSAFE_METHODS = {"send_pyobj", "recv_pyobj"}
# What shipped code must not say: code from checkpoints, shells, loaders that build objects, templates without a
# sandbox, and middleware that hides a client's leaving from the handlers.
UNSAFE_NAMES = {"BaseHTTPMiddleware", "jinja2.Environment", "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader"}
SHIPPED_UNSAFE_CALLS = {"torch.load", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "app.middleware"}
UNSAFE_OPTIONS = {"trust_remote_code": "False", "allow_pickle": "False", "shell": "False", "weights_only": "True"}


def imported_roots(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return {node.module.split(".")[0]}
    return set()


def called(node: ast.AST) -> str:
    """Dotted name of what a call calls, "" for anything else."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def findings(source: str, place: str = "losa_runtime") -> list[str]:
    """What a file of a top-level folder does that it must not.

    Only a test may make a (hostile) pickle, and not even a test may load one. The shipped packages must not use other
    doors to pickle either; training may keep tensors with torch.load, which by default reads nothing else.
    """
    shipped = place not in ("tests", "benchmarks")
    unsafe = UNSAFE_MODULES - ({"pickle"} if place == "tests" else set()) | ({"multiprocessing"} if shipped else set())
    found = []
    for node in ast.walk(ast.parse(source)):
        found += [f"imports {name}" for name in imported_roots(node) & unsafe]
        name = called(node)
        if name in UNSAFE_CALLS or name.split(".")[-1] in UNSAFE_METHODS:
            found.append(f"calls {name}")
        if isinstance(node, ast.keyword) and ast.unparse(node.value) != UNSAFE_OPTIONS.get(node.arg or ""):
            found += [f"says {ast.unparse(node)}"] if node.arg in UNSAFE_OPTIONS else []
        if shipped:
            found += shipped_findings(node, name)
    return found


def shipped_findings(node: ast.AST, name: str) -> list[str]:
    """The same for what only shipped code must not do. name: of what a call calls."""
    if name in SHIPPED_UNSAFE_CALLS:
        return [f"calls {name}"]
    if isinstance(node, ast.ImportFrom):
        return [f"imports {a.name}" for a in node.names if {a.name, f"{node.module}.{a.name}"} & UNSAFE_NAMES]
    if isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_NAMES:
        return [f"says {ast.unparse(node)}"]
    if isinstance(node, ast.Tuple | ast.List):
        words = [ast.unparse(item) for item in node.elts]
        if words[:2] == ["sys.executable", "'-m'"]:
            # Without -P the folder that somebody stands in, maybe a downloaded checkpoint, is searched for modules.
            return ["starts python without -P"]
    return []


def test_no_pickle_marshal_or_eval() -> None:
    bad = {}
    for path in all_source_files():
        relative = path.relative_to(ROOT)
        if found := findings(path.read_text(), relative.parts[0]):
            bad[str(relative)] = found
    assert bad == {}


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pickle", 1),
        ("import pickle; pickle.loads(b'')", 2),
        ("from marshal import loads", 1),
        ("import multiprocessing.pool", 1),
        ("eval('1')", 1),
        ("socket.recv_pyobj()", 1),
        ("torch.load('x')", 1),
        ("read('x', weights_only=False)", 1),
        ("model.eval()", 0),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", 1),
        ("AutoModel.from_pretrained(x, trust_remote_code=False)", 0),
        ("AutoModel.from_pretrained(x, trust_remote_code=config.trust)", 1),
        ("np.load(f, allow_pickle=True)", 1),
        ("subprocess.run(c, shell=True)", 1),
        ("from starlette.middleware.base import BaseHTTPMiddleware", 1),
        ("@app.middleware('http')\nasync def f(): ...", 1),
        ("from jinja2 import Environment", 1),
        ("jinja2.Environment()", 1),
        ("yaml.load(f, yaml.Loader)", 1),
        ("yaml.load(f, yaml.SafeLoader)", 0),
        ("C = (sys.executable, '-m', 'x')", 1),
        ("C = (sys.executable, '-P', '-m', 'x')", 0),
        ("from .pickle import jar", 0),
    ],
)
def test_the_search_finds_what_it_should(source: str, count: int) -> None:
    assert len(findings(source)) == count


def test_no_test_is_skipped_for_a_missing_package() -> None:
    word = re.compile(r"\bimport" + r"orskip\b")
    assert [str(p) for p in source_files(ROOT / "tests") if word.search(p.read_text())] == []

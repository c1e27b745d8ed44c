"""Compile every spec for every architecture, where there need be no GPU: cubin, PTX and what they use, or a failure.

`python -m losa_kernels.triton.compile` fails if a kernel does not compile, spills, or uses more than its budget. What
was compiled from the same source before is not compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from losa_kernels.triton.launch import Launch
from losa_kernels.triton.resources import Resources, compiler_log
from losa_kernels.triton.specs import ARCHS, SPECS, Spec

WARP = 32
ALIGNED = [["tt.divisibility", 16]]
JOBS = os.cpu_count() or 1


class Job(NamedTuple):
    """A spec for an architecture."""

    name: str
    arch: int

    def file(self, folder: Path, suffix: str) -> Path:
        """Where something made of it lies."""
        return folder / f"{self.name}.sm_{self.arch}.{suffix}"


def main(arguments: list[str] | None = None) -> int:
    """0 = everything compiles within its budget."""
    parser = argparse.ArgumentParser(prog="python -m losa_kernels.triton.compile", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/triton"), help="folder of the results")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="architectures, such as 80 90")
    parser.add_argument("--only", nargs="+", default=SPECS, choices=SPECS, metavar="SPEC", help="names of specs")
    parser.add_argument("--jobs", type=int, default=JOBS, help="processes at a time")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET: found 1, allowed: unset, since the interpreter compiles nothing")
    jobs = [Job(*pair) for pair in product(chosen.only, chosen.arch)]
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.part is not None:
        return _compile_all(jobs[chosen.part :: chosen.jobs], chosen.out)
    stale = [job for job in jobs if _fresh(job, chosen.out) is None]
    failed = _side_by_side(stale, chosen) if stale else False
    return _report(jobs, chosen.out) or int(failed)


def _side_by_side(stale: list[Job], chosen: argparse.Namespace) -> bool:
    """Compile these jobs, several processes at a time; True if one of them failed."""
    count = max(1, min(chosen.jobs, len(stale)))
    if count == 1:
        return bool(_compile_all(stale, chosen.out))
    names, archs = (list(dict.fromkeys(column)) for column in zip(*stale, strict=True))
    command = [sys.executable, "-P", "-m", "losa_kernels.triton.compile"]
    command += ["--out", str(chosen.out), "--jobs", str(count), "--only", *names, "--arch", *map(str, archs)]
    running = [subprocess.Popen([*command, "--part", str(part)]) for part in range(count)]
    codes = [process.wait() for process in running]
    return any(codes)


def _compile_all(jobs: list[Job], folder: Path) -> int:
    failures = 0
    for job in jobs:
        if _fresh(job, folder) is None:
            try:
                _compile(job, folder)
            except (triton.TritonError, RuntimeError) as error:
                failures += 1
                print(f"{job.name} for sm_{job.arch}: {error}", file=sys.stderr)
    return min(failures, 1)


def _compile(job: Job, folder: Path) -> None:
    """Write cubin, PTX and, last, a JSON file with what they use and the key of the source."""
    launch = SPECS[job.name].launch()
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    with compiler_log(folder / "cache") as log:
        made = triton.compile(_source(launch), target=GPUTarget("cuda", job.arch, WARP), options=options)
    used = Resources.read(log.getvalue(), made.metadata.shared)
    job.file(folder, "cubin").write_bytes(made.asm["cubin"])
    job.file(folder, "ptx").write_text(made.asm["ptx"])
    facts = {"key": _key(job, launch), "name": made.metadata.name, "warps": launch.warps, **used._asdict()}
    job.file(folder, "json").write_text(json.dumps(facts, indent=1))


def _source(launch: Launch) -> ASTSource:
    """A launch as the compiler takes it: types of what varies, values of what does not."""
    signature: dict[str, str] = {}
    fixed: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], fixed[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = mangle_type(value)
            attributes[(place,)] = ALIGNED
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if not parameter.do_not_specialize and isinstance(value, int):
                raise RuntimeError(f"{parameter.name}: found an int that is compiled in, allowed: do_not_specialize")
    return ASTSource(launch.kernel, signature, fixed, attributes)


def _key(job: Job, launch: Launch) -> str:
    """Changes with whatever the result is made of."""
    source = _source(launch)
    parts = (source.hash(), job.arch, launch.warps, launch.stages, triton.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _fresh(job: Job, folder: Path) -> Resources | None:
    """What the compiled job uses, or None if it was not compiled from this source."""
    facts = job.file(folder, "json")
    if not facts.exists() or not job.file(folder, "cubin").exists():
        return None
    found = json.loads(facts.read_text())
    if found["key"] != _key(job, SPECS[job.name].launch()):
        return None
    return Resources(**{field: found[field] for field in Resources._fields})


def _report(jobs: list[Job], folder: Path) -> int:
    """Print what every job uses; 1 if one is missing or over its budget."""
    table = Table("kernel", "sm", "registers", "shared", "stack", "spills", "", title="compiled kernels")
    bad = 0
    for job in jobs:
        used = _fresh(job, folder)
        verdict = "not compiled" if used is None else _verdict(used, SPECS[job.name])
        numbers = ["-"] * 4 if used is None else [str(number) for number in used.shown]
        table.add_row(job.name, str(job.arch), *numbers, verdict)
        bad += bool(verdict)
    Console(width=110).print(table)
    print(f"{len(jobs) - bad} of {len(jobs)} kernels compiled within their budgets")
    return min(bad, 1)


def _verdict(used: Resources, spec: Spec) -> str:
    """What is wrong, or nothing."""
    wrong = []
    if used.stack or used.spill_stores or used.spill_loads:
        wrong.append("spills")
    for name, found, allowed in (("registers", used.registers, spec.registers), ("shared", used.shared, spec.shared)):
        if found > allowed:
            wrong.append(f"{name}: found {found}, allowed {allowed}")
    return ", ".join(wrong)


if __name__ == "__main__":
    sys.exit(main())

"""`losa env`: what is installed and what this machine can do, for choosing options and for reports of problems."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import losa_runtime

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

PACKAGES = (
    *("torch", "numpy", "safetensors", "tokenizers", "pydantic", "pyzmq", "fastapi", "uvicorn", "uvloop"),
    *("triton", "flashinfer-python", "torchao", "transformers", "sglang"),
)
# What the kernels (and torch) choose by, in the kernel's spelling.
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
Facts = dict[str, dict[str, str]]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Register the command and its options."""
    parser = subparsers.add_parser(
        "env",
        allow_abbrev=False,
        help="show versions, CPU, kernels and GPU",
        description="Show versions, what CPU and GPU can do, and whether the kernels can be used. "
        "Of LOSA_ variables only the names are shown.",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    facts = environment()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for group, rows in facts.items():
        for name, text in rows.items():
            table.add_row(name, escape(text))
        if group != list(facts)[-1]:
            table.add_section()
    Console().print(table)
    return 0


def environment() -> Facts:
    """All facts, in groups."""
    return {
        "software": _software(),
        "machine": _machine(),
        "kernels": _kernels(),
        "gpu": _gpu(),
        "settings": _settings(),
    }


def _software() -> dict[str, str]:
    found = {"losa-runtime": losa_runtime.__version__, "python": f"{platform.python_version()} ({sys.executable})"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict[str, str]:
    import torch

    model, flags = _cpu()
    memory = psutil.virtual_memory()
    return {
        "system": platform.platform(),
        "CPU": model,
        "instructions": " ".join(name for name in CPU_FEATURES if name in flags) or "unknown",
        "cores": f"{psutil.cpu_count(logical=False) or '?'}, logical {os.cpu_count()}, for this process {_usable()}",
        "threads of torch": str(torch.get_num_threads()),
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
    }


def _usable() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu() -> tuple[str, set[str]]:
    """Name and feature flags, where the system tells them as Linux does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
    return fields.get("model name", platform.machine()), set(fields.get("flags", fields.get("Features", "")).split())


def _kernels() -> dict[str, str]:
    from losa_kernels.native.library import FILE, Kernels, NativeUnavailable, NativeUnfit

    place = os.environ.get("LOSA_KERNELS") or str(FILE)
    try:
        kernels = Kernels()
    except (NativeUnavailable, NativeUnfit) as reason:
        return {"CPU kernels": f"not usable: {reason}"}
    return {"CPU kernels": f"{kernels.level} (of {', '.join(kernels.offered)})", "library": place}


def _gpu() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {"GPU": f"none that torch sees (built for {_built_for(torch)})"}
    found: dict[str, str] = {}
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        capability = f"compute capability {facts.major}.{facts.minor}"
        found[f"GPU {number}"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {capability}"
    found["torch built for"] = _built_for(torch)
    return found


def _built_for(torch: Any) -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _settings() -> dict[str, str]:
    names = sorted(name for name in os.environ if name.startswith("LOSA_"))
    return {"LOSA_ variables": ", ".join(names) or "none"}

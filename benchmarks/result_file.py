"""Result files: one JSON row per run, with the machine, the versions and the commit that it was measured on.

A benchmark prints its row as its last line; with --output it also adds it to a file here, and with --record it puts it
in the place of its last one. Knows no benchmark.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "flashinfer-python", "torchao")


def circumstances(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the options: device, load of the last minute, versions, commit (marked if files
    were changed), date."""
    return {
        "device_name": _device_name(device),
        "cores": os.process_cpu_count() if hasattr(os, "process_cpu_count") else len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row, in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(row) + "\n").encode())


def keep_row(path: Path, row: dict[str, Any]) -> None:
    """Put a row in the place of the one with the same `benchmark`, or behind all others."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        rows[json.loads(line)["benchmark"]] = line
    rows[row["benchmark"]] = json.dumps(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text("".join(line + "\n" for line in rows.values()))
    beside.replace(path)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The short hash, with `+` behind it if tracked files, results aside, differ from it; empty outside a checkout."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return commit + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    found = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True)
    return found.stdout.strip()

"""Compiling the Triton kernels without a GPU: every kernel has a spec, and one that spills or grows is a failure."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from losa_kernels import triton as room
from losa_kernels.triton import compile as command
from losa_kernels.triton.launch import noted_launches, power_of_two
from losa_kernels.triton.resources import Resources
from losa_kernels.triton.specs import ARCHS, SPECS, Spec

SMALL = "merge_states"
LOG = """ptxas info    : Compiling entry function '_merge' for 'sm_90a'
ptxas info    : Function properties for _merge
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 52 registers, used 1 barriers"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "losa_kernels.triton.compile", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


def test_every_kernel_has_a_spec() -> None:
    """And every spec names a kernel that its call launches."""
    [folder] = room.__path__
    kernels = {
        name for path in Path(folder).glob("*.py") for name in re.findall(r"def (_\w+_kernel)\(", path.read_text())
    }
    assert len(kernels) >= 15
    assert {spec.kernel for spec in SPECS.values()} == kernels
    for spec in SPECS.values():
        assert spec.launch().kernel.__name__ == spec.kernel


def test_numbers_that_change_from_step_to_step_are_not_compiled_in() -> None:
    """Neither by value nor by their divisibility: a batch of another size must find the kernel compiled."""
    varying = {
        "_prefix_kernel": ["segments", "room", "chunk", "peak_width"],
        "_prefill_kernel": ["room", "chunk"],
        "_merge_parts_kernel": ["segments", "splits", "vectors"],
        "_merge_states_kernel": ["vectors"],
        "_block_kernel": ["splits", "room"],
        "_scores_kernel": ["width"],
        "_bars_kernel": ["segments", "width"],
        "_mark_kernel": ["segments", "width"],
        "_list_kernel": ["width", "tiles", "capacity"],
        "_mass_kernel": ["width"],
        "_entries_kernel": ["lists", "capacity", "splits"],
        "_merge_entries_kernel": ["segments", "splits", "slots"],
    }
    for name, spec in SPECS.items():
        launch = spec.launch()
        plain = [key for key, value in launch.arguments.items() if isinstance(value, int) and key.islower()]
        assert plain == varying.get(spec.kernel, []), name


def test_what_is_compiled_is_kept_until_the_source_changes(tmp_path: Path) -> None:
    """By two processes, then by the one that needs to compile less."""
    where = ("--out", str(tmp_path), "--arch", "80", "90", "--only", SMALL)
    done = run(*where, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 kernels compiled within their budgets" in done.stdout
    cubins, facts = ([tmp_path / f"{SMALL}.sm_{arch}.{kind}" for arch in (80, 90)] for kind in ("cubin", "json"))
    assert all(cubin.read_bytes()[:4] == b"\x7fELF" for cubin in cubins)
    assert ".target sm_90" in (tmp_path / f"{SMALL}.sm_90.ptx").read_text()
    found = json.loads(facts[0].read_text())
    assert found["name"] == "_merge_states_kernel" and 16 < found["registers"] <= SPECS[SMALL].registers
    assert found["spill_stores"] == found["spill_loads"] == found["stack"] == 0

    made = [cubin.stat().st_mtime_ns for cubin in cubins]
    facts[0].write_text(json.dumps({**found, "registers": 255}))
    facts[1].write_text(json.dumps({**json.loads(facts[1].read_text()), "key": "of another source", "registers": 255}))
    again = run(*where)
    assert again.returncode == 1 and "1 of 2 kernels compiled within their budgets" in again.stdout
    assert "registers: found 255, allowed 64" in " ".join(again.stdout.split())
    assert cubins[0].stat().st_mtime_ns == made[0] and cubins[1].stat().st_mtime_ns > made[1]


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        command.main([])
    assert "TRITON_INTERPRET: found 1, allowed: unset" in capsys.readouterr().err


def test_the_log_of_the_assembler_is_read() -> None:
    used = Resources.read(LOG, 1024)
    assert used == Resources(52, 1024, 16, 12, 8) and used.shown == (52, 1024, 16, 20)
    with pytest.raises(RuntimeError, match="the assembler's log"):
        Resources.read("ptxas info : nothing", 0)


@pytest.mark.parametrize(
    ("used", "verdict"),
    [
        (Resources(64, 1000, 0, 0, 0), ""),
        (Resources(65, 1000, 0, 0, 0), "registers: found 65, allowed 64"),
        (Resources(64, 1001, 0, 0, 0), "shared: found 1001, allowed 1000"),
        (Resources(64, 1000, 8, 0, 0), "spills"),
        (Resources(70, 1000, 0, 4, 0), "spills, registers: found 70, allowed 64"),
    ],
)
def test_verdicts(used: Resources, verdict: str) -> None:
    assert command._verdict(used, Spec("_kernel", lambda: None, 64, 1000)) == verdict


def test_a_missing_result_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command._report([command.Job(SMALL, arch) for arch in ARCHS], tmp_path) == 1
    assert "0 of 5 kernels" in capsys.readouterr().out


def test_noting_launches_nothing() -> None:
    with noted_launches() as launches:
        SPECS[SMALL].call()
        with noted_launches() as inner:
            SPECS["merge_parts"].call()
    assert [len(launches), len(inner)] == [1, 1]
    assert isinstance(launches[0].arguments["out"], torch.Tensor) and launches[0].arguments["out"].is_meta


def test_powers_of_two() -> None:
    assert [power_of_two(number) for number in (0, 1, 2, 3, 4, 5, 80, 128)] == [1, 1, 2, 4, 4, 8, 128, 128]

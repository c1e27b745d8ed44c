"""The kernels' own tests once more with a library that checks every access and every overflow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.native import require_native

ROOT = Path(__file__).parents[2]
SUITES = [file for file in Path(__file__).parent.glob("test_native_*.py") if file != Path(__file__)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_access_out_of_bounds_and_no_undefined_behaviour(tmp_path: Path) -> None:
    require_native()
    assert len(SUITES) >= 9
    cmake = Path(sys.executable).with_name("cmake")
    configure = (cmake, "-S", ROOT / "kernels", "-B", tmp_path, "-DLOSA_SANITIZE=ON", f"-DLOSA_OUTPUT={tmp_path}")
    for command in (configure, (cmake, "--build", tmp_path)):
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
    compiler = os.environ.get("CXX", "c++")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),  # the interpreter itself knows nothing of sanitizers
        "ASAN_OPTIONS": "detect_leaks=0",
        "LOSA_KERNELS": str(tmp_path / "liblosa_kernels.so"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, SUITES)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

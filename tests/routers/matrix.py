"""`python -m tests.routers.matrix`: installs the routers under build/routers and runs this folder's tests with each.

Exits with 1 if a test failed or none ran.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from tests.routers.recipes import ROOT, ROUTERS


def main(argv: Sequence[str] | None = None) -> int:
    """Build what is missing, run, report; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.routers.matrix", description=__doc__)
    parser.add_argument("routers", nargs="*", choices=[[], *ROUTERS], help="some of them (default: all)")
    names = parser.parse_args(argv).routers or list(ROUTERS)
    for name in names:
        router = ROUTERS[name]
        if not router.built:
            print(f"{router.name}: building {router.folder.relative_to(ROOT)}", flush=True)
            router.build()
    codes = {name: _run(name) for name in names}
    for name, code in codes.items():
        print(f"{ROUTERS[name].name}: {'passed' if code == 0 else f'pytest ended with {code}'}")
    return int(any(codes.values()))


def _run(name: str) -> int:
    # -k with the parameter's ending bracket: one name may be a part of the other.
    command = [sys.executable, "-m", "pytest", "tests/routers", "-m", "slow", "-v", "-k", f"[{name}]"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

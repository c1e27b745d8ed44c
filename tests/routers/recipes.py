"""Which routers, and where: each in an environment of its own under build/routers, from the package index."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "routers"
# Short intervals, so that a drill takes seconds.
OPTIONS = (
    *("--policy", "cache_aware", "--host", "127.0.0.1", "--health-check-endpoint", "/ready"),
    *("--health-check-interval-secs", "1", "--health-failure-threshold", "2", "--health-success-threshold", "1"),
    *("--cb-failure-threshold", "3", "--cb-timeout-duration-secs", "5"),
)


class Router(NamedTuple):
    """package, version: on the index. program: in its environment. keeps_custom: it passes custom_params on."""

    package: str
    version: str
    program: str
    keeps_custom: bool

    @property
    def name(self) -> str:
        """Package and version."""
        return f"{self.package} {self.version}"

    @property
    def folder(self) -> Path:
        """Its environment."""
        return FOLDER / f"{self.package}-{self.version}"

    @property
    def built(self) -> bool:
        """Whether the environment is complete."""
        return (self.folder / "complete").exists()

    def command(self, port: int, metrics_port: int, workers: list[str]) -> list[str]:
        """Starts it."""
        head = [str(self.folder / "bin" / self.program), "launch", "--worker-urls", *workers]
        return [*head, "--port", str(port), "--prometheus-port", str(metrics_port), *OPTIONS]

    def build(self) -> None:
        """Make the environment. Raises SystemExit with what pip said."""
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.folder)], check=True)
        pip = [str(self.folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        words = [*pip, f"{self.package}=={self.version}"]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.name} could not be installed:\n{done.stdout[-2000:]}")
        (self.folder / "complete").touch()


ROUTERS = {
    router.package: router
    for router in (
        Router("smg", "1.13.0", "smg", keeps_custom=True),
        Router("sglang-router", "0.3.2", "sglang-router", keeps_custom=False),
    )
}

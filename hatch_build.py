"""Compiles the CPU kernels into a wheel. An editable install takes them from `make kernels` instead."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "liblosa_kernels.so"


def compiler() -> str | None:
    """The C++ compiler that CMake would take."""
    return shutil.which(os.environ.get("CXX", "c++"))


class KernelBuildHook(BuildHookInterface):
    """With a C++ compiler the wheel is for this platform; without one it is for any, and torch computes attention."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """CMake, where there is none."""
        return [] if shutil.which("cmake") or not compiler() else ["cmake>=3.24"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library beside the source tree and add it to the wheel."""
        if version == "editable":
            return
        if not compiler():
            self.app.display_warning("No C++ compiler: the wheel will not contain the CPU kernels.")
            return
        self._folder = tempfile.mkdtemp(prefix="losa-kernels-")
        configure = [
            "cmake",
            "-S",
            str(Path(self.root, "kernels")),
            "-B",
            self._folder,
            f"-DLOSA_OUTPUT={self._folder}",
        ]
        for command in (configure, ["cmake", "--build", self._folder]):
            subprocess.run(command, check=True)
        build_data["force_include"][str(Path(self._folder, LIBRARY))] = f"losa_kernels/native/{LIBRARY}"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was built; the wheel has its copy."""
        if hasattr(self, "_folder"):
            shutil.rmtree(self._folder, ignore_errors=True)

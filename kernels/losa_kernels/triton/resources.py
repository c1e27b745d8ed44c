"""What a compiled kernel uses of a processor, as the assembler tells it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import triton

SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


class Resources(NamedTuple):
    """Registers per thread; bytes of shared memory per program; bytes of stack and of spilled registers per thread."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @classmethod
    def read(cls, log: str, shared: int) -> Resources:
        """From the assembler's log; shared memory is the compiler's to say. Raises RuntimeError."""
        spills, registers = SPILLS.search(log), REGISTERS.search(log)
        if spills is None or registers is None:
            raise RuntimeError(f"the assembler's log: found {log[:200]!r}, allowed: its report on registers and spills")
        stack, stores, loads = (int(number) for number in spills.groups())
        return cls(int(registers.group(1)), shared, stack, stores, loads)

    @property
    def shown(self) -> tuple[int, int, int, int]:
        """Registers, shared memory, stack and spilled bytes."""
        return self.registers, self.shared, self.stack, self.spill_stores + self.spill_loads


@contextmanager
def compiler_log(cache: Path) -> Iterator[io.StringIO]:
    """Within, kernels are compiled anew, their other by-products lie in `cache`, and the log is collected."""
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), triton.knobs.cache.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        triton.knobs.cache.dir = str(cache)
        with redirect_stdout(log):
            yield log

"""Where tests run the Triton kernels: on a GPU if there is one, else in Triton's interpreter, on the CPU.

The interpreter must be asked for before triton is first imported (tests/conftest.py does) and serves one program after
another at some 10 ms each, so grids stay tiny. Its bfloat16 matrix products are wrong: queries are float32 or float16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.runtime import interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _serve_newer_numpy() -> None:
    """Let tensors bound loops: the interpreter holds scalars in arrays, which numpy 2.4 no longer takes as ints."""
    patch: Callable[[Any, Any], None] = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


if DEVICE.type == "cpu":
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 was not set when triton was imported"
    _serve_newer_numpy()

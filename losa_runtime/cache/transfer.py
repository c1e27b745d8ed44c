"""Host values on their way to the device.

A copy of ordinary host memory to a GPU makes the host wait until the device has done all that it was asked before.
From pinned memory the copy is queued like a kernel, and nobody waits. Knows nothing of what the values mean.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(values: Collection[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host values, nested as they are, on the device."""
    return queued(torch.tensor(values, dtype=dtype), device)


def arrays_to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """int64 vectors as tensors on the device, in one copy. On the CPU there is none: the memory is shared."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    together = queued(torch.from_numpy(np.concatenate(arrays)), device)
    return list(together.split([array.size for array in arrays]))


def queued(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; the copy is queued behind what the device was asked before."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)

"""Host values on their way to the device: whole, in order, in one copy, and where kernels expect them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from losa_runtime.cache import transfer
from losa_runtime.cache.transfer import to_device, vectors_to_device

CPU, META = torch.device("cpu"), torch.device("meta")


def test_nested_values_keep_their_shape() -> None:
    assert to_device([[1, 2], [3, 4]], torch.int64, CPU).tolist() == [[1, 2], [3, 4]]
    assert to_device((True, False), torch.bool, CPU).tolist() == [True, False]
    assert to_device(np.array([0.25]), torch.float32, CPU).dtype == torch.float32


def test_vectors_on_a_cpu_share_the_memory_of_arrays() -> None:
    array = np.arange(5)
    mine, listed, nothing = vectors_to_device([array, (7, 8), []], CPU)
    array[0] = 9
    assert mine.tolist() == [9, 1, 2, 3, 4] and listed.tolist() == [7, 8]
    assert nothing.shape == (0,) and {x.dtype for x in (mine, listed, nothing)} == {torch.int64}


def test_vectors_travel_together_and_begin_at_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one copy is looked at before it leaves, as nothing can be seen on the device it goes to."""
    sent: list[torch.Tensor] = []
    queue = transfer.queued

    def noted(host: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(host)
        return queue(host, device)

    monkeypatch.setattr(transfer, "queued", noted)
    vectors = [[1, 2, 3], [], [4], [5, 6]]
    found = vectors_to_device(vectors, META)
    [host] = sent
    assert [x.shape[0] for x in found] == [3, 0, 1, 2] and all(x.is_contiguous() for x in found)
    offsets = [x.storage_offset() for x in found]
    assert all(offset % 2 == 0 for offset in offsets)
    assert [host[at : at + len(v)].tolist() for at, v in zip(offsets, vectors, strict=True)] == vectors

"""The tape does again what was recorded, with what the storages hold now, and refuses what a capture refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from losa_kernels.triton.merge import merge_states
from tests.kernels.interpreter import DEVICE
from tests.runner.tape import CaptureRefused, Tape, device_call


def taped(run: Callable[[], Tensor]) -> tuple[Tape, Tensor]:
    """The tape of `run`, and what came out while recording."""
    found: list[Tensor] = []
    tape = Tape()
    tape.record(lambda: found.append(run()))
    return tape, found[0]


def test_operations_views_and_writes_in_place() -> None:
    x, weight, memory = torch.randn(4, 6), torch.randn(3, 6), torch.zeros(3, 4)

    def run() -> Tensor:
        y = torch.nn.functional.linear(x, weight).T
        memory.copy_(y * 2)
        memory[1].add_(1.0)
        picked = memory.reshape(2, 6)[:, x[0].argsort()[:2]]
        out = torch.empty(2, 2)
        torch.add(picked, x.sum(), out=out)
        return out.to(torch.float64)

    tape, out = taped(run)
    for _ in range(2):
        x.copy_(torch.randn(4, 6))
        memory.fill_(9.0)
        tape.replay()
        got, kept = out.clone(), memory.clone()
        assert torch.equal(got, run()) and torch.equal(kept, memory)


def test_launches_and_calls_are_done_again() -> None:
    states = [torch.randn(5, 8, device=DEVICE), torch.randn(5, device=DEVICE)]
    others = [torch.randn(5, 8, device=DEVICE), torch.randn(5, device=DEVICE)]
    total = torch.zeros(1, device=DEVICE)

    def run() -> Tensor:
        out, lse = merge_states(*states, *others)
        device_call(lambda: total.fill_(sum(lse.tolist())))
        return out + total

    tape, out = taped(run)
    assert len(tape) == 5  # two allocations, the launch, the call, the sum
    states[1].copy_(torch.randn(5, device=DEVICE))
    others[0].zero_()
    tape.replay()
    got = out.clone()
    assert torch.equal(got, run())


def test_what_the_host_has_said_is_frozen() -> None:
    x, factor = torch.ones(3), 2.0
    tape, out = taped(lambda: x * factor)
    factor = 5.0
    x.fill_(4.0)
    tape.replay()
    assert out.tolist() == [8.0] * 3


def test_what_nobody_wrote_is_poison() -> None:
    def half_written() -> Tensor:
        out = torch.empty(4)
        out[:2] = 1.0
        return out * 1.0

    tape, out = taped(half_written)
    assert out[:2].tolist() == [1.0, 1.0] and bool(out[2:].isnan().all())
    with torch.inference_mode():
        out.zero_()
    tape.replay()
    assert bool(out[2:].isnan().all())


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x[0].item(),
        lambda x: int(x[0]),
        lambda x: bool(x.any()),
        lambda x: range(x.long()[0]),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: x.cpu(),
        lambda x: x[x > 1],
        lambda x: x.__setitem__(x > 1, 0.0),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 1),
        lambda x: x.long().unique(),
        lambda x: torch.bincount(x.long()),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.tensor([1.0]) + x,
        lambda x: torch.from_numpy(np.ones(3)) + x,
    ],
)
def test_what_waits_for_the_device_is_refused(run: Callable[[Tensor], object]) -> None:
    x = torch.arange(3).float()
    with pytest.raises(CaptureRefused):
        Tape().record(lambda: run(x))
    Tape().record(lambda: x.repeat_interleave(2))  # and nothing is left of it
    Tape().record(lambda: x.repeat_interleave(x.long(), output_size=3))

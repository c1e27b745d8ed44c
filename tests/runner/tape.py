"""Recording what a function does to tensors and doing it again: the semantics of a CUDA graph, on a CPU.

A replay computes the same operations on the same storages, in the same order, whatever the host has in mind by then:
what came from the host while recording is frozen. What a CUDA stream that is being captured refuses is refused here,
too: whatever waits for the device, or makes a tensor of host values. Memory that nobody has written is poisoned.

A tape records operations of torch, launches of Triton kernels, and what is wrapped in `device_call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from losa_kernels.triton.launch import Launch, taken_launches

# Operations that wait for the device: the size or the value of their result is needed on the host.
WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere"),
    *("masked_select", "bincount", "histc", "unique_dim", "_unique2", "unique_consecutive", "_unique", "tensor_split"),
}
LEAVING = {"tolist", "numpy", "__array__", "cpu", "item", "__bool__", "__int__", "__float__", "__index__", "pin_memory"}
ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
POISON = {torch.int64: 1 << 40, torch.int32: 1 << 29, torch.int16: 1 << 14, torch.uint8: 171, torch.bool: True}


class CaptureRefused(RuntimeError):
    """What was recorded does something that cannot be captured."""


class _Operation(NamedTuple):
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


class Tape(TorchDispatchMode):
    """Records once, replays any number of times. Everything that was used stays alive with it."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[Callable[[], object]] = []
        self._alive: list[Any] = []
        self._running = False  # inside of something that is recorded as a whole

    def record(self, run: Callable[[], None]) -> None:
        """Run and record. Raises CaptureRefused."""
        global _recording
        assert not self._events and _recording is None, "a tape records once, and one at a time"
        _recording = self
        try:
            with torch.inference_mode(), _NoWayOut(self), taken_launches(self._launch), self:
                run()
        finally:
            _recording = None

    @torch.inference_mode()
    def replay(self) -> None:
        """Do it again, on the same storages."""
        for event in self._events:
            event()

    def __len__(self) -> int:
        return len(self._events)

    def call(self, run: Callable[[], object]) -> None:
        """Run and record something as a whole."""
        with self._whole():
            run()
        self._events.append(run)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        before, self._running = self._running, True
        try:
            yield
        finally:
            self._running = before

    @property
    def running(self) -> bool:
        """True inside of something that is recorded as a whole."""
        return self._running

    def _launch(self, launch: Launch) -> None:
        self._alive.append(launch)
        self.call(launch.run)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._running:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        _refuse(name, args, kwargs)
        out = func(*args, **kwargs)
        operation = _Operation(func, args, kwargs, out)
        self._alive.append(operation)
        if name in ALLOCATING:
            _poison(out)
            self._events.append(lambda: _poison(out))
        elif any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
            self._events.append(lambda: func(*args, **kwargs))
        elif not _is_view(operation):
            self._events.append(lambda: _again(operation))
        return out


class _NoWayOut(TorchFunctionMode):
    """Refuses what takes values to the host without an operation."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in LEAVING and not self._tape.running:
            raise CaptureRefused(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


_recording: Tape | None = None


def device_call(run: Callable[[], object]) -> None:
    """Run something that stands for work on the device: a tape that is recording takes it as a whole."""
    if _recording is None or _recording.running:
        run()
    else:
        _recording.call(run)


def _refuse(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if name in WAITING:
        raise CaptureRefused(f"{name} waits for the device")
    if name == "lift_fresh" and args[0].ndim:  # a single number goes along with the launch
        raise CaptureRefused("a tensor is made of host values")
    by_tensor = len(args) == 1 or len(_tensors((args, kwargs))) > 1
    if name == "repeat_interleave" and by_tensor and kwargs.get("output_size") is None:
        raise CaptureRefused("repeat_interleave without output_size waits for the device")
    if name in ("index", "index_put", "index_put_") and any(
        isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    ):
        raise CaptureRefused(f"{name} by a mask waits for the device")
    if name == "where" and len(args) == 1:
        raise CaptureRefused("where without values waits for the device")


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_iter(tree) if isinstance(x, Tensor)]


def _is_view(operation: _Operation) -> bool:
    """Whether what came out lies in what went in."""
    given = {x.untyped_storage().data_ptr() for x in _tensors((operation.args, operation.kwargs))}
    return all(x.untyped_storage().data_ptr() in given for x in _tensors(operation.out))


def _again(operation: _Operation) -> None:
    found = operation.func(*operation.args, **operation.kwargs)
    for old, new in zip(_tensors(operation.out), _tensors(found), strict=True):
        assert old.shape == new.shape, f"{operation.func}: found {new.shape} for {old.shape}"
        old.copy_(new)


def _poison(x: Tensor) -> None:
    x.fill_(POISON.get(x.dtype, float("nan")))

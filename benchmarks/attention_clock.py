"""Timing a call and its parts: on a CPU by the clock, on a GPU by events that the device notes as it gets to them.

A GPU is first given something to wait for, so that the host has asked for the whole call before it begins: what is
measured is the device's time, not the host's. If the call itself waits for the device, both are in it. Nested parts
count for the outer one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

HEAD_START_CYCLES = 12_000_000  # of a GPU: some 6 ms, more than the host takes for a layer


class Timing(NamedTuple):
    """Seconds in all and by part. host: until the call had returned."""

    seconds: float
    parts: dict[str, float]
    host: float


class HostClock:
    """For a CPU. `part` is a context around a part of a call that is measured."""

    def __init__(self) -> None:
        self._now: dict[str, float] = {}
        self._inside = False

    def measure(self, call: Callable[[], object]) -> Timing:
        """Run a call once."""
        self._now = {}
        began = time.perf_counter()
        call()
        seconds = time.perf_counter() - began
        return Timing(seconds, self._now, seconds)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part."""
        if self._inside:
            yield
            return
        self._inside, start = True, time.perf_counter()
        yield
        self._inside = False
        self._now[name] = self._now.get(name, 0.0) + time.perf_counter() - start


class DeviceClock:
    """For a GPU, likewise."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._inside = False

    def measure(self, call: Callable[[], object]) -> Timing:
        """Run a call once."""
        self._marks = []
        torch.cuda.synchronize(self._device)
        torch.cuda._sleep(HEAD_START_CYCLES)
        first = self._mark()
        began = time.perf_counter()
        call()
        host = time.perf_counter() - began
        last = self._mark()
        torch.cuda.synchronize(self._device)
        parts: dict[str, float] = {}
        for name, start, stop in self._marks:
            parts[name] = parts.get(name, 0.0) + start.elapsed_time(stop) / 1e3
        return Timing(first.elapsed_time(last) / 1e3, parts, host)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part."""
        if self._inside:
            yield
            return
        self._inside, start = True, self._mark()
        yield
        self._inside = False
        self._marks.append((name, start, self._mark()))

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def clock_for(device: torch.device) -> HostClock | DeviceClock:
    """The clock of a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()

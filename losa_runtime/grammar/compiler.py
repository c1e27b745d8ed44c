"""Patterns to automata, each within a time and a size, remembered by use. Safe to call from several threads.

A hostile pattern costs its own request an error and a worker process its life; nothing else notices.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from typing import IO

from losa_runtime.core.errors import InvalidRequest
from losa_runtime.grammar.automaton import ByteAutomaton

MAX_PATTERN = 64 * 2**10  # characters; long enough for the schemas that people write
TIME_LIMIT_S = 1.5
START_LIMIT_S = 20.0  # for a worker to come up on a busy machine; a pattern's own time starts after it
MEMORY_LIMIT = 1 << 30
REMEMBERED_BYTES = 64 << 20

Asked = tuple[str, tuple[str, ...]]  # a pattern, and the strings that its matches do not hold


class Compiler:
    """A worker process, started when it is first needed, and what it has made. Whoever made it calls `close`."""

    def __init__(self, time_limit_s: float = TIME_LIMIT_S, memory_limit: int = MEMORY_LIMIT) -> None:
        self.time_limit_s, self.memory_limit = time_limit_s, memory_limit
        self._lock, self._memory = threading.Lock(), threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._known: OrderedDict[Asked, ByteAutomaton] = OrderedDict()
        self._known_bytes = 0

    @property
    def remembered(self) -> tuple[int, int]:
        """How many automata are remembered, and their bytes."""
        with self._memory:
            return len(self._known), self._known_bytes

    def compile(self, pattern: str, field: str, without: tuple[str, ...] = ()) -> ByteAutomaton:
        """The automaton of a pattern that has to match the whole output, which holds none of the strings `without`.

        Raises InvalidRequest naming `field`.
        """
        if len(pattern) > MAX_PATTERN:
            raise InvalidRequest(field, f"a pattern of {len(pattern)} characters", f"at most {MAX_PATTERN}")
        asked = (pattern, without)
        found = self.recall(asked)
        if found is not None:
            return found
        with self._lock:
            found = self.recall(asked) or self._compile(asked, field)
            self._remember(asked, found)
            return found

    def close(self) -> None:
        """End the worker. The compiler may be used again."""
        with self._lock:
            self._stop()

    def _compile(self, asked: Asked, field: str) -> ByteAutomaton:
        pattern, without = asked
        worker = self._running()
        assert worker.stdin is not None and worker.stdout is not None
        deadline = time.monotonic() + self.time_limit_s
        try:
            worker.stdin.write(json.dumps({"pattern": pattern, "without": without}).encode() + b"\n")
            worker.stdin.flush()
            head = json.loads(_read_line(worker.stdout, deadline))
            if "error" in head:
                raise InvalidRequest(field, pattern, f"a regular expression of Rust's regex syntax ({head['error']})")
            return ByteAutomaton.from_bytes(_read(worker.stdout, head["size"], deadline))
        except TimeoutError:
            self._stop()
            allowed = f"a pattern that compiles within {self.time_limit_s:g} s"
            raise InvalidRequest(field, pattern, allowed) from None
        except (OSError, EOFError):
            self._stop()
            allowed = f"a pattern that compiles within {self.memory_limit >> 20} MiB"
            raise InvalidRequest(field, pattern, allowed) from None

    def _running(self) -> subprocess.Popen[bytes]:
        """The worker, warmed up: its start does not count as a pattern's time."""
        if self._worker is None or self._worker.poll() is not None:
            command = (sys.executable, "-P", "-m", "losa_runtime.grammar.compile_worker", str(self.memory_limit))
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
            assert worker.stdin is not None and worker.stdout is not None
            self._worker = worker
            deadline = time.monotonic() + START_LIMIT_S
            try:
                worker.stdin.write(b'{"pattern": "a", "without": []}\n')
                worker.stdin.flush()
                _read(worker.stdout, json.loads(_read_line(worker.stdout, deadline))["size"], deadline)
            except (OSError, EOFError, TimeoutError) as error:
                self._stop()
                raise RuntimeError("the process that compiles patterns does not start") from error
        return self._worker

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def recall(self, asked: Asked) -> ByteAutomaton | None:
        """What is known already; never waits for what is being compiled."""
        with self._memory:
            if asked in self._known:
                self._known.move_to_end(asked)
            return self._known.get(asked)

    def _remember(self, asked: Asked, made: ByteAutomaton) -> None:
        with self._memory:
            self._known_bytes += made.next_SC.nbytes if asked not in self._known else 0
            self._known[asked] = made
            while self._known_bytes > REMEMBERED_BYTES and len(self._known) > 1:
                _, oldest = self._known.popitem(last=False)
                self._known_bytes -= oldest.next_SC.nbytes


def _read_line(stream: IO[bytes], deadline: float) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        line += _read(stream, 1, deadline)
    return bytes(line)


def _read(stream: IO[bytes], size: int, deadline: float) -> bytes:
    """Exactly `size` bytes. Raises TimeoutError, or EOFError when the other side is gone."""
    found = bytearray()
    while len(found) < size:
        if not select.select((stream,), (), (), max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        piece = stream.read(size - len(found))
        if not piece:
            raise EOFError
        found += piece
    return bytes(found)

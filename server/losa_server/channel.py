"""The wire between the two processes: zmq PUSH and PULL over `ipc://` sockets in a private directory.

This room knows bytes, sizes and who binds (the HTTP process, which outlives an engine). It does not know what a message
means. Whatever arrives and is not a message of the right direction is counted, logged and dropped: a peer can lose its
own message that way, but can stop nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from pydantic import ValidationError

from losa_server.messages import Direction, Message, encode

log = logging.getLogger("losa.channel")

MAX_MESSAGE_BYTES = 64 * 2**20
# Frames that may wait in a socket. The request manager bounds the live requests far below this.
HIGH_WATER_MARK = 20_000
FIRST_LOGGED = 10  # malformed messages that are each logged; then every thousandth
MAX_DIRECTORY_LENGTH = 75
LOCK = "in-use"  # a file that is locked as long as the HTTP process lives
YOUNG_S = 60.0  # a directory is younger than this between its making and its locking


class MessageTooLarge(Exception):
    """A message over MAX_MESSAGE_BYTES; it was not sent. zmq itself would drop the connection without a word."""


class ChannelBusy(Exception):
    """The other side did not take the message in time; it was not sent."""


class SocketDirectory:
    """A private directory (mode 0700) for the sockets of one engine life, and a lock that says it is in use. Whoever
    made it calls `remove`."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="losa-", dir=_base()))
        self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def address(self, direction: Direction) -> str:
        """The zmq address of one direction."""
        return f"ipc://{self.path / direction.name}"

    def remove(self) -> None:
        """Delete the directory and its sockets. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_stale_directories() -> list[Path]:
    """Delete socket directories of ours that nobody uses any more (both processes were killed at once); which."""
    stale = []
    for path in Path(_base()).glob("losa-*"):
        with contextlib.suppress(OSError):
            about, lock = path.lstat(), os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if about.st_uid == os.getuid() and time.time() - about.st_mtime > YOUNG_S:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                    stale.append(path)
            finally:
                os.close(lock)
    return stale


def _base() -> str:
    # A socket's path must be shorter than 108 bytes; some temporary directories are too deep for that.
    return "/tmp" if len(tempfile.gettempdir()) > MAX_DIRECTORY_LENGTH else tempfile.gettempdir()


def directory_of(address: str) -> Path:
    """The directory that holds the socket of an `ipc://` address."""
    return Path(address.removeprefix("ipc://")).parent


def checked(message: Message) -> bytes:
    """Encode a message. Raises MessageTooLarge."""
    data = encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(
            f"a {type(message).__name__} of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES} bytes"
        )
    return data


class Inbox:
    """Decodes the frames of one direction. malformed: how many were dropped so far."""

    def __init__(self, direction: Direction) -> None:
        self.direction = direction
        self.malformed = 0

    def decode(self, frames: list[bytes]) -> Any | None:
        """The message, or None for anything that is not exactly one well-formed frame."""
        try:
            if len(frames) != 1:
                raise ValueError(f"{len(frames)} frames instead of 1")
            if len(frames[0]) > MAX_MESSAGE_BYTES:
                raise ValueError(f"{len(frames[0])} bytes")
            return self.direction.words.validate_json(frames[0])
        except (ValidationError, ValueError, RecursionError) as error:
            self.malformed += 1
            # The content is not logged: it may hold a prompt, and it is not ours. Nor does a flood fill the disk.
            if self.malformed <= FIRST_LOGGED or self.malformed % FIRST_LOGGED**3 == 0:
                what = f"dropped malformed message {self.malformed} on {self.direction.name}"
                log.warning("%s: %s", what, _reason(error))
            return None


class Sender:
    """Blocking sender of the engine process. Connects; not safe to share between threads."""

    def __init__(self, address: str, timeout_s: float = 20.0) -> None:
        self._socket = _socket(zmq.Context.instance(), zmq.PUSH)
        self._socket.setsockopt(zmq.SNDTIMEO, int(timeout_s * 1000))
        self._socket.connect(address)

    def send(self, message: Message) -> None:
        """Send, waiting up to the time-out. Raises MessageTooLarge or ChannelBusy."""
        data = checked(message)
        try:
            self._socket.send(data)
        except zmq.Again:
            raise ChannelBusy("the other process does not read") from None

    def close(self, linger_s: float = 1.0) -> None:
        """Close; messages not yet taken are kept for at most `linger_s`."""
        self._socket.close(linger=int(linger_s * 1000))


class Receiver:
    """Polling receiver of the engine process. Connects."""

    def __init__(self, address: str, direction: Direction) -> None:
        self._socket = _socket(zmq.Context.instance(), zmq.PULL)
        self._socket.connect(address)
        self.inbox = Inbox(direction)

    def receive(self, wait_s: float) -> Any | None:
        """The next message; None when none came within `wait_s` or when what came was malformed."""
        if not self._socket.poll(int(wait_s * 1000)):
            return None
        return self.inbox.decode(self._socket.recv_multipart())

    def waiting(self) -> bool:
        """True when something can be received without waiting."""
        return bool(self._socket.poll(0))

    def close(self) -> None:
        """Close; unread messages are lost."""
        self._socket.close(linger=0)


class AsyncSender:
    """Sender of the HTTP process. Binds."""

    def __init__(self, address: str) -> None:
        self._socket = _socket(zmq.asyncio.Context.instance(), zmq.PUSH)
        self._socket.bind(address)

    async def send(self, data: bytes) -> None:
        """Send encoded bytes (see `checked`), waiting for the engine to connect or to read."""
        await self._socket.send(data)

    def close(self, linger_s: float = 0.5) -> None:
        """Close; messages not yet taken are kept for at most `linger_s`."""
        self._socket.close(linger=int(linger_s * 1000))


class AsyncReceiver:
    """Receiver of the HTTP process. Binds."""

    def __init__(self, address: str, direction: Direction) -> None:
        self._socket = _socket(zmq.asyncio.Context.instance(), zmq.PULL)
        self._socket.bind(address)
        self.inbox = Inbox(direction)

    async def receive(self) -> Any | None:
        """The next message; None when what came was malformed."""
        return self.inbox.decode(await self._socket.recv_multipart())

    def close(self) -> None:
        """Close; unread messages are lost."""
        self._socket.close(linger=0)


def _socket(context: Any, kind: int) -> Any:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    # A little above our own limit: exceeding zmq's makes it drop the connection and later messages with it.
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES + 2**16)
    return socket


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['type']}"
    return f"{type(error).__name__}: {error}"

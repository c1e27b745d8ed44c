"""The engine process's sign of life: a thread that says every now and then that it runs, and whether work moves on.

A process that is stopped, or gone, says nothing. One that hangs in a forward, or turns in circles, goes on to say since
when. Knows no requests.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from losa_server.channel import ChannelBusy, Sender
from losa_server.messages import Heartbeat


class WorkClock:
    """Since when there has been work without any progress. `note` in the loop that works, `stalled_s` from anywhere."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._forwards = -1
        self._since: float | None = None

    def note(self, busy: bool, forwards: int) -> None:
        """Call before and after each step. forwards: how many have come to their end so far."""
        if not busy:
            self._since = None
        elif self._since is None or forwards != self._forwards:
            self._since = self._now()
        self._forwards = forwards

    @property
    def stalled_s(self) -> float:
        """Seconds."""
        since = self._since
        return 0.0 if since is None else self._now() - since


class Pulse:
    """Heartbeats to an address until `stop`, on a socket of its own: sockets cannot be shared between threads."""

    def __init__(self, address: str, beat_s: float, clock: WorkClock) -> None:
        self._address, self._beat_s, self._clock = address, beat_s, clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it; the last beats are lost."""
        self._stop.set()
        self._thread.join(1.0)

    def _beat(self) -> None:
        sender = Sender(self._address, timeout_s=0.0)
        try:
            while not self._stop.wait(self._beat_s):
                with contextlib.suppress(ChannelBusy):  # nobody reads: there is nobody to tell
                    sender.send(Heartbeat(stalled_s=self._clock.stalled_s))
        finally:
            sender.close(linger_s=0.0)

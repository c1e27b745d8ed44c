"""What the HTTP process knows of the engine's queue, so that one request too many is refused without asking.

Requests that are on their way count as waiting: that is what they will do first. The engine has the last word.
"""

from __future__ import annotations


class QueueView:
    """Of one engine life. limit: requests that may wait; None: not known, anything may be sent."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.waiting = 0
        self._sent = self._received = 0

    def sent(self, count: int) -> None:
        """So many requests are on their way."""
        self._sent += count

    def told(self, received: int, waiting: int) -> None:
        """The engine's own figures."""
        self._received, self.waiting = received, waiting

    @property
    def length(self) -> int:
        """Requests that wait in the engine or are on their way to it."""
        return self.waiting + self._sent - self._received

    def has_room(self, count: int) -> bool:
        """Whether so many more would be taken, as far as can be known here."""
        return self.limit is None or self.length + count <= self.limit

"""One HTTP exchange as the rooms behind HTTP know it: who asks, under which id, and what came of it.

Whoever starts requests hands its visit along: it keeps the prefix caches and the request names of different callers
apart, and it is what logs, metrics and traces speak of. Knows no sockets and no tokens.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Caller:
    """Who holds a key. name: empty where the server has no keys. admin: may also manage the server.

    salt: callers share cached prefixes only if theirs is the same.
    """

    name: str = ""
    salt: str = ""
    admin: bool = True

    def namespace(self, asked: str) -> str:
        """The prefix cache of this caller's requests. asked: what the request itself says; never begins with @."""
        return f"@{len(self.salt)}:{self.salt}:{asked}" if self.salt else asked


@dataclass
class Visit:
    """One exchange, from its first byte to its last. id: in logs and headers. started: seconds of time.monotonic()."""

    caller: Caller = Caller()
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.monotonic)

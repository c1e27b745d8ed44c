"""One HTTP exchange as the rooms behind HTTP know it: who asks, under which id, and what came of it.

Whoever starts requests hands its visit along: it keeps the prefix caches and the request names of different callers
apart, and it is what logs and traces speak of. Knows no sockets and no tokens.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


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


class TraceParent(NamedTuple):
    """The W3C trace context that a client sent: hexadecimal ids, and whether it records this trace."""

    trace_id: str
    span_id: str
    sampled: bool


@dataclass
class Tally:
    """What the requests of one exchange have brought together, summed over those that are closed.

    ended: how many ended how (see Generation.outcome). first_s: seconds to the first tokens of the first one.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    forwards: int = 0
    blocks: int = 0
    denoise_steps: int = 0
    kv_bytes: int = 0
    dense_bytes: int = 0
    first_s: float | None = None
    ended: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: str, first_s: float | None, **counts: int) -> None:
        """Count one request. counts: by the names of the fields."""
        self.requests += 1
        self.ended[outcome] += 1
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)
        if first_s is not None:
            self.first_s = first_s if self.first_s is None else min(self.first_s, first_s)


@dataclass
class Visit:
    """One exchange, from its head to its last byte. id: in logs and headers. started: seconds of time.monotonic()."""

    caller: Caller = Caller()
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    trace: TraceParent | None = None
    started: float = field(default_factory=time.monotonic)
    tally: Tally = field(default_factory=Tally)

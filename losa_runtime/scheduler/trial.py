"""After a forward that raised: which of its requests was it? Each runs alone until it has got past where it failed.

Whoever gets there is acquitted; the one that raises alone is the culprit. Knows no cache and no runner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from losa_runtime.scheduler.req import Progress, Req


class Trial:
    """The suspects of the last failed round, in the order of their trial."""

    def __init__(self) -> None:
        self._suspects: deque[tuple[Req, Progress]] = deque()

    def open(self, reqs: Iterable[Req]) -> None:
        """Suspect these, which have to get past where they are now."""
        self._suspects = deque((req, req.progress) for req in reqs)

    def suspect(self) -> Req | None:
        """Who runs alone now; None when nobody is suspected any more. Those that have left or wait again are let go."""
        while self._suspects:
            req, failed_at = self._suspects[0]
            if req.lease is not None and req.progress <= failed_at:
                return req
            self._suspects.popleft()
        return None

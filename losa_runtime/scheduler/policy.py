"""Who of the waiting is admitted first. Knows no pages but what the cache says of a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from losa_runtime.cache.prefix_cache import PrefixCache
from losa_runtime.scheduler.req import Req

Policy = Literal["fcfs", "lpm", "priority"]

MATCHES_PER_ROUND = 128  # waiting requests whose prefix is looked up per round; more of them are served as they came


def in_order(policy: Policy, waiting: Sequence[Req], cache: PrefixCache) -> list[Req]:
    """The waiting requests in the order of admission.

    fcfs: as they stand in the queue, where a retracted request is first. lpm: the longest cached prefix first, equals
    as they came; with more than MATCHES_PER_ROUND waiting like fcfs, since looking them all up would cost more than it
    brings. priority: the highest first, equals as they came.
    """
    if policy == "priority":
        return sorted(waiting, key=lambda req: (-req.request.priority, req.order))
    if policy == "lpm" and len(waiting) <= MATCHES_PER_ROUND:
        found = {id(r): cache.peek(r.request.namespace, r.tokens[: r.prefill_target]) for r in waiting}
        return sorted(waiting, key=lambda req: (-found[id(req)], req.order))
    return list(waiting)

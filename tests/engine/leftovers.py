"""What an engine still holds of requests that have ended. For tests only."""

from __future__ import annotations

from collections.abc import Sized

from losa_runtime.engine import Engine
from losa_runtime.sparse.memory import HeldLists
from losa_runtime.sparse.method import SparseMethod


def method_state(method: SparseMethod) -> int:
    """Entries of blocks that a method remembers, beside the memory that all share."""
    kept = [value._lists if isinstance(value, HeldLists) else value for value in vars(method).values()]
    return sum(len(value) for value in kept if isinstance(value, dict | set) and isinstance(value, Sized))


def leftovers(engine: Engine) -> dict[str, int]:
    """Counts that are all 0 when no request is live; what is only cached does not count."""
    cache, scheduler, runner = engine.parts.cache, engine.scheduler, engine.parts.runner
    cache.check()
    return {
        "requests": len(scheduler._live) + len(scheduler.waiting) + len(scheduler.running),
        "slots": scheduler.limits.max_running - len(set(scheduler._slots)),
        "leases": len(cache._leases),
        "pages": cache.pool.num_pages - cache.pool.free - cache.tree.evictable_pages,
        "locks": sum(node.locks for node in cache.tree.nodes()),
        "condemned": len(cache.tree._condemned),
        "blocks remembered": len(next(iter(runner.methods.values())).memory._open),
        "lists remembered": sum(method_state(method) for method in runner.methods.values()),
    }

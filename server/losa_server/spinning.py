"""How long an idle thread of a parallel region spins before it sleeps, said to OpenMP before anything loads it.

By default GNU's OpenMP spins for some milliseconds at every barrier. On cores of one's own nothing is faster; where
other processes run, the thread that is waited for is not even on a core, and those who spin keep it off (measured:
benchmarks/LOG.md). Knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping

SPINS = 1000  # some microseconds: as fast as the default on idle cores
OWN_WORDS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # with these, users say it themselves


def spins_briefly(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment with a short spin, unless it says something about that already."""
    own = any(name in environ for name in OWN_WORDS)
    return {**environ} if own else {**environ, "GOMP_SPINCOUNT": str(SPINS)}

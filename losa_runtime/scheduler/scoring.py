"""Scoring beside other work: how many positions go into a round, and whose. Knows no pages and no queue.

A scored position is a whole block of rows that reads the prefix for itself, so scoring is bulk work: beside others it
gets half of the rows that bulk work may have, and its reading is bounded; several requests share it evenly, so that a
short one does not wait for a long one.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_READS = 2**20  # prefix tokens that the scored positions of one round may read together, beside other work


def shares(wanted: Sequence[int], total: int) -> list[int]:
    """Divide `total` positions among requests that want so many: evenly, and what one does not need goes to the rest.

    What cannot be divided goes to the earlier ones.
    """
    given = [0] * len(wanted)
    while total > 0:
        hungry = [i for i, want in enumerate(wanted) if given[i] < want]
        if not hungry:
            break
        each = max(1, total // len(hungry))
        for i in hungry:
            more = min(each, wanted[i] - given[i], total)
            given[i] += more
            total -= more
    return given


def positions_of_round(
    wanted: Sequence[int], contexts: Sequence[int], budget: int, block_length: int, alone: bool
) -> list[int]:
    """Positions to score for each request.

    wanted: positions that are left; contexts: tokens that each of them reads. budget: rows of bulk work per round.
    alone: nothing else is running. At least one position in all, so that scoring always goes on.
    """
    rows = budget if alone else budget // 2
    given = shares(wanted, max(1, rows // block_length))
    if alone:
        return given
    reads = MAX_READS // max(1, sum(count > 0 for count in given))
    most = [max(1, reads // max(1, context)) for context in contexts]
    return [min(count, limit) for count, limit in zip(given, most, strict=True)]

"""Which further log-probabilities a round must report, and to which token each belongs. Knows no sampling rule.

Requests that want none cost nothing. Shape letters: R candidate rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from losa_runtime.core.request import Alternatives
from losa_runtime.core.work import RowContext
from losa_runtime.decoding.sampling import Others, Wanted


def wanted(contexts: Sequence[RowContext], sizes: Sequence[int], device: torch.device) -> Wanted | None:
    """What the requests of some segments want of their rows; None if nothing. sizes: rows of each segment."""
    top = max((c.top_logprobs for c in contexts), default=0)
    if not top and not any(c.logprob_ids for c in contexts):
        return None
    owners = np.repeat(np.arange(len(contexts)), sizes).tolist()
    rows = [row for row, owner in enumerate(owners) if contexts[owner].top_logprobs]
    pairs = [(row, token) for row, owner in enumerate(owners) for token in contexts[owner].logprob_ids]
    row_M, id_M = torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2).T
    return Wanted(top, torch.tensor(rows, dtype=torch.int64, device=device), row_M, id_M)


def per_row(contexts: Sequence[RowContext], sizes: Sequence[int], others: Others) -> list[Alternatives | None]:
    """One entry per row, None in the rows of requests that want nothing."""
    ids, tops, asked = (column.cpu().tolist() for column in others)
    found: list[Alternatives | None] = []
    n = m = 0
    for context, size in zip(contexts, sizes, strict=True):
        for _ in range(size):
            found.append(_take(context, ids, tops, asked, n, m))
            n += context.top_logprobs > 0
            m += len(context.logprob_ids)
    return found


def _take(
    context: RowContext,
    ids: list[list[int]],
    tops: list[list[float]],
    asked: list[float],
    n: int,
    m: int,
) -> Alternatives | None:
    k, count = context.top_logprobs, len(context.logprob_ids)
    if not k and not count:
        return None
    top = (tuple(ids[n][:k]), tuple(tops[n][:k])) if k else ((), ())
    return Alternatives(*top, tuple(asked[m : m + count]))


def of_score(context: RowContext, logp_V: Tensor) -> Alternatives | None:
    """The alternatives at a scored position. logp_V: log-probabilities of the whole vocabulary."""
    if not context.top_logprobs and not context.logprob_ids:
        return None
    best, ids = logp_V.topk(min(context.top_logprobs, logp_V.shape[0]))
    asked = logp_V[list(context.logprob_ids)]
    return Alternatives(tuple(ids.tolist()), tuple(best.tolist()), tuple(asked.tolist()))

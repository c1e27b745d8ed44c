"""How the share of the prefix that is read grows with the number of rows that choose: Figure 3 of LoSA's paper.

The rows of a block are taken in the order of their change since the previous step, as LoSA makes them active; each
chooses its pages by QUEST's bounds, and what counts is the union. Along the dense model's steps, so that the queries
are those of the model and not of a method.
B block length, G KV heads, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.probe.play import Floats
from benchmarks.quality.probe.watch import Seen
from losa_kernels.reference.selection import Share, query_change
from losa_runtime.attention.questions import PageChoice, PerSegment

# LoSA, Trado-8B on TriviaQA, block 16, digitised; the last value is the dashed line of all rows.
PAPER = (11.0, 12.8, 13.9, 15.1, 16.2, 16.7, 16.9, 17.4, 17.7, 18.4, 19.0, 20.1, 21.5, 22.0, 22.1, 23.5)


class Choice(NamedTuple):
    """How pages are chosen. tokens: budget per query."""

    tokens: int
    share: Share


class Unions:
    """Densities per KV head of each choice, in the order of `seen`: arrays [rows 1 .. B]."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.densities: dict[Choice, list[Floats]] = {choice: [] for choice in choices}
        self._before: dict[int, Tensor] = {}  # by layer: queries of the previous step

    def note(self, step: int, seen: Seen) -> None:
        """One layer of a step; nothing is chosen in the first."""
        [length] = seen.group.counts
        if step:
            change_B = query_change(seen.q_RHD[None], self._before[seen.layer][None])[0]
            order = torch.argsort(change_B, descending=True, stable=True)
            for choice, found in self.densities.items():
                found.append(np.array([_density(seen, order[: n + 1].sort().values, choice) for n in range(length)]))
        self._before[seen.layer] = seen.q_RHD.clone()

    def curve(self, choice: Choice) -> Floats:
        """Mean over all that was seen."""
        return np.stack(self.densities[choice]).mean(0)


def _density(seen: Seen, rows: Tensor, choice: Choice) -> float:
    """Share of the prefix that these rows read together, per KV head."""
    pool, [prefix] = seen.backend.pool, seen.group.prefix_lens
    count = choice.tokens // pool.page_size
    best = PerSegment(torch.tensor([count]), (count,))
    asked = (seen.layer, seen.q_RHD, rows, (False,), best, seen.group, PageChoice(choice.share))
    kv = seen.backend.select_pages(*asked).kv
    pages = 0
    for group in range(pool.num_kv_heads):
        lists = range(group * kv.heads // pool.num_kv_heads, (group + 1) * kv.heads // pool.num_kv_heads)
        chosen = torch.cat([kv.indices[int(kv.indptr[n]) : int(kv.indptr[n + 1])] for n in lists])
        pages += int(torch.unique(chosen).shape[0])
    return pages * pool.page_size / (pool.num_kv_heads * prefix)

"""How much each token's query, key and value change between two steps: Figures 4 and 8 to 11 of LoSA's paper.

Along the dense model's steps. The change of a token is the mean squared difference over heads and dimensions; in a
layer and step, tokens are looked at as shares of the sum over the block, largest first.
B block length, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from benchmarks.quality.probe.play import Floats
from benchmarks.quality.probe.watch import Seen
from losa_kernels.reference.selection import query_change

WHAT = ("query", "key", "value", "together")


class Moved(NamedTuple):
    """One layer of a step: changes [B] of query, key and value, and the offsets revealed just before."""

    layer: int
    step: int
    query: Floats
    key: Floats
    value: Floats
    revealed: tuple[int, ...]

    def change(self, what: str) -> Floats:
        """[B] as shares of the block's sum; "together": mean of the three shares."""
        if what == "together":
            return np.mean([self.change(one) for one in WHAT[:3]], axis=0)
        one: Floats = getattr(self, what)
        return one / max(one.sum(), 1e-30)


class Changes:
    """Everything that was seen. order: the script's, set before each walk."""

    def __init__(self) -> None:
        self.order: tuple[tuple[int, ...], ...] = ()
        self.moved: list[Moved] = []
        self._before: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def note(self, step: int, seen: Seen) -> None:
        """One layer of a step."""
        now = (seen.q_RHD.clone(), seen.k_RGD.clone(), seen.v_RGD.clone())
        if step:
            before = self._before[seen.layer]
            q, k, v = (query_change(a[None], b[None])[0].double().numpy() for a, b in zip(now, before, strict=True))
            self.moved.append(Moved(seen.layer, step, q, k, v, self.order[step - 1]))
        self._before[seen.layer] = now

    def shares(self, what: str, layer: int) -> Floats:
        """Mean share of the change by rank, largest first: [B]."""
        return np.mean([np.sort(m.change(what))[::-1] for m in self.moved if m.layer == layer], axis=0)

    def tokens_for_half(self, what: str, layer: int) -> float:
        """Mean number of tokens that make up half of the change."""
        sums = [np.cumsum(np.sort(m.change(what))[::-1]) for m in self.moved if m.layer == layer]
        return float(np.mean([np.searchsorted(total, 0.5) + 1 for total in sums]))

    def overlap(self, layer: int, active: int) -> float:
        """Share of the tokens revealed just before that are among the `active` whose query changed most."""
        hits = [
            offset in np.argsort(-m.query, kind="stable")[:active]
            for m in self.moved
            if m.layer == layer
            for offset in m.revealed
        ]
        return float(np.mean(hits))

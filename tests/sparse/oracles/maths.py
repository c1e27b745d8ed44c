"""What every oracle computes with: the prefix of one request and layer, and exact attention to parts of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losa_runtime.core.batch import SparseParams

States = dict[tuple[int, int], tuple[Tensor, float]]  # (row, query head) -> output [D] and log-sum-exp


class Scene(NamedTuple):
    """One layer of one request in one denoising step. q [B, H, D], keys and values [N, G, D], float64.

    memory: the oracle's own between the steps of the block, one dict per layer. unmasked: tokens accepted before
    this step. layer, layers: which one of how many.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    page: int
    step: int
    sparse: SparseParams
    memory: dict[str, Any]
    unmasked: int = 0
    layer: int = 0
    layers: int = 1

    @property
    def rows(self) -> range:
        """Rows of the block."""
        return range(self.q.shape[0])

    @property
    def heads(self) -> range:
        """Query heads."""
        return range(self.q.shape[1])

    def kv_head(self, head: int) -> int:
        """The KV head of a query head."""
        return head * self.keys.shape[1] // self.q.shape[1]

    def group(self, kv_head: int) -> list[int]:
        """The query heads of a KV head."""
        return [head for head in self.heads if self.kv_head(head) == kv_head]

    def attend(self, row: int, head: int, listed: list[int] | range | None = None) -> tuple[Tensor, float]:
        """Softmax attention of one query to the listed prefix positions (None: all), and its log-sum-exp."""
        at = list(range(len(self.keys)) if listed is None else listed)
        kv_head = self.kv_head(head)
        return softmax(self.q[row, head], self.keys[at, kv_head], self.values[at, kv_head])

    def dense(self) -> States:
        """Every row and head over the whole prefix."""
        return {(row, head): self.attend(row, head) for row in self.rows for head in self.heads}


def softmax(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, float]:
    """Attention of one query to some keys; none give 0 and -inf."""
    if not len(keys):
        return torch.zeros_like(query), -math.inf
    scores = keys @ query / math.sqrt(len(query))
    return torch.softmax(scores, 0) @ values, float(torch.logsumexp(scores, 0))


def best(scores: list[float], count: int) -> set[int]:
    """Indices of the largest scores, ties to the lowest index."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])

"""The methods once more, from the papers' text: one request, float64, plain loops, no pages and no code shared."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from losa_runtime.core.batch import SparseParams
from tests.sparse.stage import Stage


def block_outputs(stage: Stage, name: str, start: int, sparse: SparseParams, steps: int) -> list[list[Tensor]]:
    """Attention output [B, H, D] of each step and layer of the block at `start`, every earlier block committed."""
    layers = [_layer_outputs(stage, name, start, sparse, steps, layer) for layer in range(stage.sizes.layers)]
    return [[outs[step] for outs in layers] for step in range(steps)]


def _layer_outputs(stage: Stage, name: str, start: int, sparse: SparseParams, steps: int, layer: int) -> list[Tensor]:
    s = stage.sizes
    past = [stage.rows(s, name, block, 0, layer) for block in range(start // s.block)]
    keys, values = (
        torch.cat([p[i] for p in past]).double() if past else torch.zeros(0, s.kv_heads, s.dim).double() for i in (1, 2)
    )
    remembered: dict[tuple[int, int], tuple[Tensor, float]] = {}
    outs, previous = [], torch.zeros(0)
    for step in range(steps):
        q, k, v = (x.double() for x in stage.rows(s, name, start // s.block, step, layer))
        everything = sparse.method == "dense" or (sparse.method == "losa" and step == 0)
        rows = list(range(s.block))
        if sparse.method == "losa" and step:
            rows = _most_changed(q, previous, int(sparse.active.value))
        for kv_head in range(s.kv_heads):
            listed = list(range(start))
            if not everything and start > sparse.token_budget:
                listed = _union(q, keys[:, kv_head], rows, kv_head, sparse.token_budget, stage)
            for row in rows:
                for head in range(kv_head * _share(stage), (kv_head + 1) * _share(stage)):
                    remembered[row, head] = _softmax(q[row, head], keys[listed, kv_head], values[listed, kv_head])
        outs.append(_merged(q, k, v, remembered, stage))
        previous = q
    return outs


def _share(stage: Stage) -> int:
    return stage.sizes.heads // stage.sizes.kv_heads


def _softmax(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, float]:
    if not len(keys):
        return torch.zeros_like(query), -math.inf
    scores = keys @ query / math.sqrt(len(query))
    return torch.softmax(scores, 0) @ values, float(torch.logsumexp(scores, 0))


def _most_changed(now: Tensor, before: Tensor, count: int) -> list[int]:
    change = [float(((now[row] - before[row]) ** 2).mean()) for row in range(len(now))]
    return sorted(sorted(range(len(now)), key=lambda row: (-change[row], row))[:count])


def _union(q: Tensor, keys: Tensor, rows: list[int], kv_head: int, budget: int, stage: Stage) -> list[int]:
    page, share = stage.sizes.page, _share(stage)
    pages = [keys[at : at + page] for at in range(0, len(keys), page)]
    chosen: set[int] = set()
    for row in rows:
        scores = []
        for content in pages:
            top, bottom = content.amax(0), content.amin(0)
            heads = q[row, kv_head * share : (kv_head + 1) * share]
            scores.append(max(float(torch.maximum(h * top, h * bottom).sum()) for h in heads))
        chosen |= set(sorted(range(len(pages)), key=lambda p: (-scores[p], p))[: budget // page])
    return [at for at in range(len(keys)) if at // page in chosen]


def _merged(
    q: Tensor, k: Tensor, v: Tensor, remembered: dict[tuple[int, int], tuple[Tensor, float]], stage: Stage
) -> Tensor:
    out = torch.zeros_like(q)
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            own, own_lse = _softmax(q[row, head], k[:, head // _share(stage)], v[:, head // _share(stage)])
            prefix, prefix_lse = remembered.get((row, head), (torch.zeros_like(own), -math.inf))
            top = max(own_lse, prefix_lse)
            a, b = math.exp(prefix_lse - top), math.exp(own_lse - top)
            out[row, head] = (a * prefix + b * own) / (a + b)
    return out

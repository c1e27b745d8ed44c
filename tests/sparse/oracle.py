"""Attention outputs of a whole block by the oracle of its method, merged with exact attention inside the block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from losa_runtime.core.batch import SparseParams
from tests.sparse.oracles.maths import Scene, States, softmax
from tests.sparse.stage import Stage


def block_outputs(
    stage: Stage, name: str, start: int, sparse: SparseParams, steps: int, unmasked: Sequence[int] | None = None
) -> list[list[Tensor]]:
    """Attention output [B, H, D] of each step and layer of the block at `start`, every earlier block committed.

    unmasked: tokens accepted before each step; None: one in each.
    """
    accepted = range(steps) if unmasked is None else unmasked
    layers = [_layer_outputs(stage, name, start, sparse, accepted, layer) for layer in range(stage.sizes.layers)]
    return [[outs[step] for outs in layers] for step in range(steps)]


def _layer_outputs(
    stage: Stage, name: str, start: int, sparse: SparseParams, accepted: Sequence[int], layer: int
) -> list[Tensor]:
    s = stage.sizes
    past = [stage.rows(s, name, block, 0, layer) for block in range(start // s.block)]
    keys, values = (
        torch.cat([p[i] for p in past]).double() if past else torch.zeros(0, s.kv_heads, s.dim).double() for i in (1, 2)
    )
    prefix_states = import_module(f"tests.sparse.oracles.{sparse.method}").prefix_states
    memory: dict[str, Any] = {}
    outs = []
    for step, unmasked in enumerate(accepted):
        q, k, v = (x.double() for x in stage.rows(s, name, start // s.block, step, layer))
        states = prefix_states(Scene(q, keys, values, s.page, step, sparse, memory, unmasked, layer, s.layers))
        outs.append(_merged(q, k, v, states))
    return outs


def _merged(q: Tensor, k: Tensor, v: Tensor, states: States) -> Tensor:
    out, share = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            own, own_lse = softmax(q[row, head], k[:, head // share], v[:, head // share])
            prefix, prefix_lse = states[row, head]
            top = max(own_lse, prefix_lse)
            a, b = math.exp(prefix_lse - top), math.exp(own_lse - top)
            out[row, head] = (a * prefix + b * own) / (a + b)
    return out

"""BA-Att: keys by norm, cut into blocks; the blocks that mean and variance of the pooled rows prefer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from losa_runtime.core.batch import SparseParams
from losa_runtime.sparse.ba_att import BaAttOptions
from tests.sparse.oracles.maths import Scene, States, best


def prefix_states(scene: Scene) -> States:
    """Every row over the best key blocks of each KV head, chosen in every step."""
    options = _options(scene.sparse)
    count = math.ceil(scene.sparse.token_budget / options.block_size)
    covered = len(scene.keys) <= count * options.block_size
    if covered or (scene.step == 0 and options.first_step == "dense"):
        return scene.dense()
    listed = {g: chosen_positions(scene, g, count) for g in range(scene.keys.shape[1])}
    return {(r, h): scene.attend(r, h, listed[scene.kv_head(h)]) for r in scene.rows for h in scene.heads}


def chosen_positions(scene: Scene, kv_head: int, count: int) -> list[int]:
    """The positions in the blocks with the largest mean probability over the heads of the group."""
    blocks = key_blocks(scene, kv_head)
    shares = []
    for head in scene.group(kv_head):
        logits = [block_logit(scene, head, [scene.keys[at, kv_head] for at in block]) for block in blocks]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        shares.append([weight / sum(weights) for weight in weights])
    mean = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
    return sorted(at for index in best(mean, count) for at in blocks[index])


def key_blocks(scene: Scene, kv_head: int) -> list[list[int]]:
    """Positions in the order of their keys' norms, cut."""
    options, order = _options(scene.sparse), list(range(len(scene.keys)))
    if options.sort:
        order.sort(key=lambda at: float(scene.keys[at, kv_head].norm()))
    return [order[at : at + options.block_size] for at in range(0, len(order), options.block_size)]


def block_logit(scene: Scene, head: int, keys: list[Tensor]) -> float:
    """Mean product, and in this layer perhaps what the variances add, one channel at a time."""
    options, rows, block = _options(scene.sparse), scene.q[:, head], torch.stack(keys)
    dim = rows.shape[1]
    product = spread = 0.0
    for channel in range(dim):
        q, k = rows[:, channel].tolist(), block[:, channel].tolist()
        q_mean, k_mean = sum(q) / len(q), sum(k) / len(k)
        q_var = sum((x - q_mean) ** 2 for x in q) / len(q)
        k_var = sum((x - k_mean) ** 2 for x in k) / len(k)
        product += q_mean * k_mean
        spread += q_var * k_mean**2 + k_var * q_mean**2 + q_var * k_var
    end = scene.layer in (0, scene.layers - 1)
    used = options.variance_layers == "all" or (options.variance_layers == "ends" and end)
    return product / math.sqrt(dim) + (options.beta * spread / dim if used else 0.0)


def _options(sparse: SparseParams) -> BaAttOptions:
    assert isinstance(sparse.options, BaAttOptions)
    return sparse.options

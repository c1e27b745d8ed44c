"""A prefix cut into blocks of keys with similar norms, and how much a block of queries may want each of them.

The part of BA-Att that has no state. Knows no request, no budget and no step.
B query rows, H query heads, G KV heads, D head dim, N prefix positions, n key blocks, c tokens per key block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyBlocks(NamedTuple):
    """The key blocks of one prefix, layer by layer.

    order: int64 [G, n, c], the prefix positions of each block; N where the last block is short. mean, variance:
    float32 [G, n, D], per channel over the block's keys (variance: mean squared deviation).
    """

    order_Gnc: Tensor
    mean_GnD: Tensor
    variance_GnD: Tensor

    def positions(self, chosen_Gn: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The positions in the marked blocks, as many blocks for each KV head: ascending int64 [G, m], and bool [G, m],
        False for what a short block lacks. length: N."""
        kv_heads, _, size = self.order_Gnc.shape
        positions = self.order_Gnc[chosen_Gn].view(kv_heads, -1, size).flatten(1).sort(dim=1).values
        return positions, positions < length


def cut_keys(keys_GND: Tensor, size: int, by_norm: bool) -> KeyBlocks:
    """Blocks of `size` keys in the order of their L2 norm (ascending, ties to the lowest position) or position."""
    kv_heads, length, dim = keys_GND.shape
    keys = keys_GND.float()
    if by_norm:
        order_GN = torch.argsort(keys.square().sum(-1), dim=1, stable=True)
        keys = keys.gather(1, order_GN[..., None].expand(-1, -1, dim))
    else:
        order_GN = torch.arange(length, device=keys.device).expand(kv_heads, length)
    missing = -length % size
    order_Gnc = torch.nn.functional.pad(order_GN, (0, missing), value=length).unflatten(1, (-1, size))
    keys_GncD = torch.nn.functional.pad(keys, (0, 0, 0, missing)).unflatten(1, (-1, size))
    real_Gnc1 = (order_Gnc < length)[..., None]
    count_Gn1 = real_Gnc1.sum(2)
    mean_GnD = keys_GncD.sum(2) / count_Gn1
    spread = (keys_GncD - mean_GnD[:, :, None]).square().masked_fill(~real_Gnc1, 0.0)
    return KeyBlocks(order_Gnc, mean_GnD, spread.sum(2) / count_Gn1)


def block_logits(q_BHD: Tensor, blocks: KeyBlocks, scale: float, beta: float) -> Tensor:
    """Logit of each key block for the pooled rows: float32 [G, H / G, n].

    scale qbar . kbar + beta scale^2 sum_d (Vq kbar^2 + Vk qbar^2 + Vq Vk), with means and variances per channel d. The
    sum is the variance of scale q . k over pairs of a row and a key, were the channels independent.
    """
    kv_heads, dim = blocks.mean_GnD.shape[0], q_BHD.shape[-1]
    q = q_BHD.float()
    mean_GFD = q.mean(0).view(kv_heads, -1, dim)
    kbar_GDn = blocks.mean_GnD.transpose(1, 2)
    logits_GFn = mean_GFD @ kbar_GDn * scale
    if beta == 0.0:
        return logits_GFn
    variance_GFD = q.var(0, correction=0).view(kv_heads, -1, dim)
    spread_GDn = blocks.variance_GnD.transpose(1, 2)
    varied = variance_GFD @ (kbar_GDn.square() + spread_GDn) + mean_GFD.square() @ spread_GDn
    return logits_GFn + varied * (beta * scale**2)


def share_logits(logits_GFn: Tensor) -> Tensor:
    """Logarithm of the softmax over the blocks, averaged over a KV group, up to a constant: float32 [G, n].

    In logarithms, because probabilities that vanish would tie. A logit that is not a number stays by itself.
    """
    known_GFn = logits_GFn.masked_fill(logits_GFn.isnan(), -torch.inf)
    return (logits_GFn - known_GFn.logsumexp(-1, keepdim=True)).logsumexp(1)

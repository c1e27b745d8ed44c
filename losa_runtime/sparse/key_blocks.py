"""A prefix cut into blocks of keys, by norm or position, and how much a block of queries may want each of them.

The part of BA-Att that has no state. Knows no request, no budget and no step.
B query rows, H query heads, G KV heads, D head dim, N prefix positions, n key blocks, c tokens per key block, P pages,
p pages per key block, m = 2 moments or 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class KeyBlocks(NamedTuple):
    """The key blocks of one prefix, layer by layer.

    mean, variance: float32 [G, n, D], per channel over the block's keys (variance: mean squared deviation; None: not
    wanted). order: int64 [G, n, c], the prefix positions of each block, N where the last block is short; None: block i
    holds the positions from i * c on.
    """

    mean_GnD: Tensor
    variance_GnD: Tensor | None
    order_Gnc: Tensor | None

    def positions(self, chosen_Gn: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The positions in the marked blocks, which have an order, as many for each KV head: ascending int64 [G, t],
        and bool [G, t], False for what a short block lacks. length: N."""
        assert self.order_Gnc is not None, "blocks by position need no list of positions"
        kv_heads, _, size = self.order_Gnc.shape
        positions = self.order_Gnc[chosen_Gn].view(kv_heads, -1, size).flatten(1).sort(dim=1).values
        return positions, positions < length


def cut_keys(keys_GND: Tensor, size: int, by_norm: bool, spread: bool = True) -> KeyBlocks:
    """Blocks of `size` keys in the order of their L2 norm (ascending, ties to the lowest position) or position.

    spread: whether variances are wanted.
    """
    length, dim = keys_GND.shape[1:]
    keys, missing, order_Gnc = keys_GND.float(), -length % size, None
    if by_norm:
        order_GN = torch.argsort(keys.square().sum(-1), dim=1, stable=True)
        keys = keys.gather(1, order_GN[..., None].expand(-1, -1, dim))
        order_Gnc = pad(order_GN, (0, missing), value=length).unflatten(1, (-1, size))
    keys_GncD = pad(keys, (0, 0, 0, missing)).unflatten(1, (-1, size))
    real_nc1 = (torch.arange(length + missing, device=keys.device) < length).view(-1, size, 1)
    count_n1 = real_nc1.sum(1)
    mean_GnD = keys_GncD.sum(2) / count_n1
    if not spread:
        return KeyBlocks(mean_GnD, None, order_Gnc)
    off_GncD = (keys_GncD - mean_GnD[:, :, None]).masked_fill(~real_nc1, 0.0)
    return KeyBlocks(mean_GnD, off_GncD.square().sum(2) / count_n1, order_Gnc)


def join_pages(moments_PGmD: Tensor, page_size: int, length: int, size: int) -> KeyBlocks:
    """Blocks of `size` keys by position, from the means (and variances) of their pages, of which the last may be short.

    size: a multiple of page_size. By the law of total variance that of a block is the mean variance of its pages plus
    the variance of their means, weighted by their keys.
    """
    pages, per = moments_PGmD.shape[0], size // page_size
    missing = -pages % per
    moments_npGmD = pad(moments_PGmD, (0, 0) * 3 + (0, missing)).unflatten(0, (-1, per))
    first_P = torch.arange(pages + missing, device=moments_PGmD.device) * page_size
    count_np = (length - first_P).clamp(min=0, max=page_size).view(-1, per)
    share_npGD = (count_np / count_np.sum(1, keepdim=True))[..., None, None]
    means_npGD = moments_npGmD[:, :, :, 0]
    mean_nGD = (share_npGD * means_npGD).sum(1)
    if moments_PGmD.shape[2] == 1:
        return KeyBlocks(mean_nGD.transpose(0, 1), None, None)
    within_npGD = moments_npGmD[:, :, :, 1]
    variance_nGD = (share_npGD * (within_npGD + (means_npGD - mean_nGD[:, None]).square())).sum(1)
    return KeyBlocks(mean_nGD.transpose(0, 1), variance_nGD.transpose(0, 1), None)


def block_logits(q_BHD: Tensor, blocks: KeyBlocks, scale: float, beta: float) -> Tensor:
    """Logit of each key block for the pooled rows: float32 [G, H / G, n].

    scale qbar . kbar + beta scale^2 sum_d (Vq kbar^2 + Vk qbar^2 + Vq Vk), with means and variances per channel d. The
    sum is the variance of scale q . k over pairs of a row and a key, were the channels independent. beta 0: the blocks
    need no variances.
    """
    kv_heads, dim = blocks.mean_GnD.shape[0], q_BHD.shape[-1]
    q = q_BHD.float()
    mean_GFD = q.mean(0).view(kv_heads, -1, dim)
    kbar_GDn = blocks.mean_GnD.transpose(1, 2)
    logits_GFn = mean_GFD @ kbar_GDn * scale
    if beta == 0.0:
        return logits_GFn
    assert blocks.variance_GnD is not None, "the blocks were made without variances"
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

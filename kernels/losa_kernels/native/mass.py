"""How much softmax mass each granule of a prefix holds, per query head: one call for all segments.

S segments, R rows of the group, H query heads, D head dim, n granules of the longest prefix.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from losa_kernels.native.layout import Pages, Segments, check, query, ref
from losa_kernels.native.library import Kernels


def prefix_mass(
    kernels: Kernels,
    pages: Pages,
    segments: Segments,
    q_RHD: Tensor,
    lse_RH: Tensor,
    scale: float,
    granule: int,
    over_rows: Literal["mean", "max"] = "mean",
) -> Tensor:
    """Mean or maximum over a segment's rows of exp(scale q . k - lse), summed per granule: float32 [S, H, n].

    0 behind a segment's last granule. Equal to the reference's key_mass up to rounding. Raises ValueError.
    """
    asked = query(q_RHD, None, pages.head_dim, scale)
    check("lse", lse_RH, tuple(q_RHD.shape[:2]), torch.float32)
    if granule < 1:
        raise ValueError(f"granule: found {granule}, allowed: at least 1")
    width = -(-max(0, int(segments.prefix_lens.max())) // granule)
    mass = torch.empty(segments.count, asked.heads, width)
    sizes = (granule, int(over_rows == "max"), width)
    kernels.call(
        "losa_prefix_mass", ref(pages.c), ref(segments.c), ref(asked.c), lse_RH.data_ptr(), *sizes, mass.data_ptr()
    )
    return mass

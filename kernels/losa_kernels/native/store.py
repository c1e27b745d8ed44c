"""Storing K/V rows into pages together with the bounds and moments of the touched pages."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels.native.layout import Pages, check, ref
from losa_kernels.native.library import DTYPES, Kernels


def store(kernels: Kernels, pages: Pages, k_TGD: Tensor, v_TGD: Tensor, locations_T: Tensor) -> None:
    """Write k, v [T, G, D] at page * page_size + offset, int64 [T] and distinct; round to the pages' dtype.

    The bounds and moments of a touched page, where kept, then cover its offsets up to the last one stored. Raises
    ValueError.
    """
    check("k", k_TGD, (None, pages.kv_heads, pages.head_dim), *DTYPES)
    check("v", v_TGD, tuple(k_TGD.shape), k_TGD.dtype)
    check("locations", locations_T, (k_TGD.shape[0],), torch.int64)
    sources = (k_TGD.data_ptr(), v_TGD.data_ptr(), DTYPES[k_TGD.dtype], locations_T.data_ptr(), k_TGD.shape[0])
    kernels.call("losa_store", ref(pages.c), *sources)

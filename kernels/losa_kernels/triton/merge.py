"""Merging attention states: the parts of planned rows into one state each, and two states into one.

n planned rows, H query heads, D head dim, C splits, X any leading dimensions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.triton.launch import launch, power_of_two
from losa_kernels.triton.layout import FLOATS, Parts, Planned, check
from losa_kernels.triton.states import load_vectors, merged, merged_parts, store_vectors

VECTORS = 16  # of a program: about 2048 numbers, so that programs are worth their launch


def merge_parts(parts: Parts, planned: Planned | None = None) -> tuple[Tensor, Tensor]:
    """One state per planned row (None: per row): float32 out [n, H, D] and natural lse [n, H]; undefined behind the
    last row. A row without keys gets 0 and -inf. Raises ValueError.
    """
    splits, room, heads, dim = parts.out.shape
    check("out", parts.out, (None, room if planned is None else planned.room, None, None), torch.float32)
    check("lse", parts.lse, tuple(parts.out.shape[:3]), torch.float32)
    out, lse = torch.empty_like(parts.out[0]), torch.empty_like(parts.lse[0])
    launch(
        _merge_parts_kernel,
        (-(-room * heads // VECTORS), 1, 1),
        parts_out=parts.out,
        parts_lse=parts.lse,
        row_indptr=None if planned is None else planned.indptr,
        out=out,
        lse=lse,
        segments=0 if planned is None else planned.indptr.shape[0] - 1,
        splits=splits,
        vectors=room * heads,
        HEADS=heads,
        DIM=dim,
        WIDTH=power_of_two(dim),
        VECTORS=VECTORS,
    )
    return out, lse


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys: float32 out [X, D] and natural lse [X]. Raises ValueError.

    Two empty parts give 0 and -inf.
    """
    shape = tuple(out_a.shape)
    check("out", out_a, shape, *FLOATS)
    check("other out", out_b, shape, *FLOATS)
    for name, lse in (("lse", lse_a), ("other lse", lse_b)):
        check(name, lse, shape[:-1], torch.float32)
    out, lse = torch.empty_like(out_a, dtype=torch.float32), torch.empty_like(lse_a)
    launch(
        _merge_states_kernel,
        (-(-lse.numel() // VECTORS), 1, 1),
        out_a=out_a,
        lse_a=lse_a,
        out_b=out_b,
        lse_b=lse_b,
        out=out,
        lse=lse,
        vectors=lse.numel(),
        DIM=shape[-1],
        WIDTH=power_of_two(shape[-1]),
        VECTORS=VECTORS,
    )
    return out, lse


@triton.jit(do_not_specialize=["segments", "splits", "vectors"])
def _merge_parts_kernel(
    parts_out: tl.tensor,
    parts_lse: tl.tensor,
    row_indptr: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    segments: tl.tensor,
    splits: tl.tensor,
    vectors: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTORS: tl.constexpr,
) -> None:
    """Program (tile of vectors). Those behind the last planned row are left alone."""
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    real = vector < vectors
    if row_indptr is not None:
        real = vector < tl.load(row_indptr + segments) * HEADS
    state, log_sum = merged_parts(parts_out, parts_lse, vector, real, splits, vectors, DIM, WIDTH)
    store_vectors(out, vector, state, real, DIM, WIDTH)
    tl.store(lse + vector, log_sum, mask=real)


@triton.jit(do_not_specialize=["vectors"])
def _merge_states_kernel(
    out_a: tl.tensor,
    lse_a: tl.tensor,
    out_b: tl.tensor,
    lse_b: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    vectors: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTORS: tl.constexpr,
) -> None:
    """Program (tile of vectors)."""
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    real = vector < vectors
    first_lse = tl.load(lse_a + vector, mask=real, other=float("-inf"))
    second_lse = tl.load(lse_b + vector, mask=real, other=float("-inf"))
    first = load_vectors(out_a, vector, first_lse > float("-inf"), DIM, WIDTH)
    second = load_vectors(out_b, vector, second_lse > float("-inf"), DIM, WIDTH)
    state, log_sum = merged(first, first_lse, second, second_lse)
    store_vectors(out, vector, state, real, DIM, WIDTH)
    tl.store(lse + vector, log_sum, mask=real)

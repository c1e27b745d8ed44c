"""Device functions for merging attention states: what several kernels do with outputs and natural log-sum-exps.

X vectors of a program, D head dim. An empty state has lse -inf and an output that is never used.
"""

from __future__ import annotations

import triton
import triton.language as tl

PRECISION = tl.constexpr("tf32x3")  # of products of float32: three on tensor cores, nearly as good as one of float32


@triton.jit
def finite(lse: tl.tensor) -> tl.tensor:
    """0 in place of -inf, so that differences are defined."""
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit
def log_of_sum(top: tl.tensor, total: tl.tensor) -> tl.tensor:
    """top + log(total), -inf where the total is 0."""
    return tl.where(total == 0.0, float("-inf"), top + tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def load_vectors(
    pointer: tl.tensor, vector: tl.tensor, real: tl.tensor, DIM: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tensor:
    """The D-vectors with these numbers: float32 [X, WIDTH], 0 where not real and behind D."""
    d = tl.arange(0, WIDTH)
    mask = real[:, None] & (d < DIM)[None, :]
    return tl.load(pointer + vector[:, None] * DIM + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_vectors(
    pointer: tl.tensor, vector: tl.tensor, values: tl.tensor, real: tl.tensor, DIM: tl.constexpr, WIDTH: tl.constexpr
) -> None:
    """Write D-vectors, rounded to the type of the tensor."""
    d = tl.arange(0, WIDTH)
    mask = real[:, None] & (d < DIM)[None, :]
    tl.store(pointer + vector[:, None] * DIM + d[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def merged(out_a: tl.tensor, lse_a: tl.tensor, out_b: tl.tensor, lse_b: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Both states as one: [X, D] and [X]. Two empty states give 0 and -inf."""
    top = finite(tl.maximum(lse_a, lse_b))
    weight_a, weight_b = tl.exp(lse_a - top), tl.exp(lse_b - top)
    total = weight_a + weight_b
    out = weight_a[:, None] * out_a + weight_b[:, None] * out_b
    return out / tl.where(total == 0.0, 1.0, total)[:, None], log_of_sum(top, total)


@triton.jit
def merged_parts(
    parts_out: tl.tensor,
    parts_lse: tl.tensor,
    vector: tl.tensor,
    real: tl.tensor,
    splits: tl.tensor,
    vectors: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """All parts of these vectors as one state, in the order of the splits: [X, D] and [X].

    vectors: those of one split. Parts without keys are not read, so their number makes no difference.
    """
    top = tl.full(vector.shape, float("-inf"), tl.float32)
    for split in range(splits):
        at = split * vectors.to(tl.int64) + vector
        top = tl.maximum(top, tl.load(parts_lse + at, mask=real, other=float("-inf")))
    top = finite(top)
    total = tl.zeros(vector.shape, tl.float32)
    out = tl.zeros((vector.shape[0], WIDTH), tl.float32)
    for split in range(splits):
        at = split * vectors.to(tl.int64) + vector
        lse = tl.load(parts_lse + at, mask=real, other=float("-inf"))
        weight = tl.exp(lse - top)
        total += weight
        out += weight[:, None] * load_vectors(parts_out, at, lse > float("-inf"), DIM, WIDTH)
    return out / tl.where(total == 0.0, 1.0, total)[:, None], log_of_sum(top, total)

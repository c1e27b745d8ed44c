"""Rotary position encoding in the neox layout (first half paired with second half), plain, linear or YaRN.

Knows positions and head dimensions, nothing of requests or models. Shape letters: T tokens, N heads, D head dim,
E rotation pairs, F = 2 E channels that are rotated (D, or fewer).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from losa_runtime.core.config import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, trained: int) -> tuple[Tensor, float]:
    """Angular frequencies float32 [E] in radians per position, and the factor for cos and sin.

    trained: context in tokens before stretching; YaRN (arXiv 2309.00071, eq. 17-23) counts rotations over it.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frequency_E = 1.0 / (theta ** (pairs / head_dim))
    if scaling is None:
        return frequency_E, 1.0
    stretched_E = frequency_E / scaling.factor
    if scaling.kind == "linear":
        return stretched_E, 1.0

    def pair_turning(rotations: float) -> float:
        """The (fractional) pair index that makes this many full rotations over the trained context."""
        return head_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), head_dim - 1)
    ramp_E = (torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    keep_E = 1.0 - ramp_E.clamp(0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0
    return frequency_E * keep_E + stretched_E * (1 - keep_E), factor


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin, float32 [max_context, E], built once and shared by all layers.

    They are buffers outside the state dict and are built on the CPU even while parameters are made on the meta
    device; `.to(device)` moves them with the model.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, head_dim: int, theta: float, scaling: RopeScaling | None, original_context: int, max_context: int
    ) -> None:
        super().__init__()
        frequency_E, factor = rope_frequencies(head_dim, theta, scaling, original_context)
        angles = torch.arange(max_context, dtype=torch.float32, device="cpu")[:, None] * frequency_E
        self.register_buffer("cos", angles.cos() * factor, persistent=False)
        self.register_buffer("sin", angles.sin() * factor, persistent=False)

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """For int64 positions [T], each below max_context -> cos and signed sin, float32 [T, F], for `rotate`."""
        cos_TE, sin_TE = self.cos[positions_T], self.sin[positions_T]
        return torch.cat((cos_TE, cos_TE), dim=-1), torch.cat((-sin_TE, sin_TE), dim=-1)


def rotate(x_TND: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotate every head of x [T, N, D] by its token's angles; computed in float32, returned in x's dtype.

    The first F channels of a head are its pairs; what lies behind is left as it is. sin: negative in its first half, so
    that few operations do, which is what a small batch pays for.
    """
    rotated = cos_TF.shape[-1]
    whole = rotated == x_TND.shape[-1]
    wide = (x_TND if whole else x_TND[..., :rotated]).float()
    other = wide.roll(rotated // 2, -1)  # each channel's partner
    turned = torch.addcmul(wide * cos_TF[:, None], other, sin_TF[:, None]).to(x_TND.dtype)
    return turned if whole else torch.cat((turned, x_TND[..., rotated:]), dim=-1)

"""The specification of experts: each token goes through the gated feed-forward layers that were chosen for it.

T tokens, C hidden, E experts, I hidden of an expert, J = 2 I, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def mix_experts(
    x_TC: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    gate_up_EJC: Tensor,
    down_ECI: Tensor,
    linear: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """Sum over k of weight[t, k] * down(silu(gate(x)) * up(x)) of expert chosen[t, k]: [T, C] in x's dtype.

    gate_up: gate, then up. chosen: int64, weight: float32, both [T, K]. Products, by `linear` (rows, weight), are in
    x's dtype; the sum over k is float32, in the order of k.
    """
    out_TKC = x_TC.new_zeros((*chosen_TK.shape, x_TC.shape[1]), dtype=torch.float32)
    for expert in chosen_TK.unique().tolist():
        token_N, place_N = (chosen_TK == expert).nonzero(as_tuple=True)
        gate_NI, up_NI = linear(x_TC[token_N], gate_up_EJC[expert]).chunk(2, dim=-1)
        out_TKC[token_N, place_N] = linear(F.silu(gate_NI) * up_NI, down_ECI[expert]).float()
    return (out_TKC * weight_TK[..., None]).sum(1).to(x_TC.dtype)

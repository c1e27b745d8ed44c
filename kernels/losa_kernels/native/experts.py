"""A mixture of experts in C++: an expert's weights are read once for all of its tokens, however many or few.

T tokens, C hidden, E experts, I hidden of an expert, J = 2 I, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels.native.layout import check, ref
from losa_kernels.native.library import DTYPES, CExperts, Kernels


def mix_experts(
    kernels: Kernels, x_TC: Tensor, chosen_TK: Tensor, weight_TK: Tensor, gate_up_EJC: Tensor, down_ECI: Tensor
) -> Tensor:
    """As the reference's, with arithmetic in float32: [T, C] in x's dtype, which the weights share.

    The bits of a row depend on neither its company nor the number of threads. Raises ValueError.
    """
    check("gate_up", gate_up_EJC, (None, None, None), *DTYPES)
    count, both, hidden = gate_up_EJC.shape
    if both % 2:
        raise ValueError(f"gate_up: found {both} rows per expert, allowed: an even number")
    check("down", down_ECI, (count, hidden, both // 2), gate_up_EJC.dtype)
    check("x", x_TC, (None, hidden), gate_up_EJC.dtype)
    check("chosen", chosen_TK, (x_TC.shape[0], None), torch.int64)
    check("weight", weight_TK, tuple(chosen_TK.shape), torch.float32)
    experts = CExperts(count, hidden, both // 2, DTYPES[x_TC.dtype], gate_up_EJC.data_ptr(), down_ECI.data_ptr())
    out_TC = torch.empty_like(x_TC)
    tokens, per_token = chosen_TK.shape
    rows = (x_TC.data_ptr(), tokens, chosen_TK.data_ptr(), weight_TK.data_ptr(), per_token, out_TC.data_ptr())
    kernels.call("losa_mix_experts", ref(experts), *rows)
    return out_TC

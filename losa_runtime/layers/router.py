"""Which experts a token goes to, and with what weights. Knows no expert.

Everything behind the product with the router's weights is float32, and of equal scores the lower expert is chosen.
Shape letters: T tokens, C hidden, E experts, K experts per token, N groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from losa_runtime.core.expert_config import ExpertConfig
from losa_runtime.layers.linear import linear
from losa_runtime.layers.pieces import Piece


def best(score_TE: Tensor, count: int) -> Tensor:
    """int64 [T, count]: the largest of each row, of equal ones the first."""
    return score_TE.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()


def within_groups(score_TE: Tensor, groups: int, kept: int) -> Tensor:
    """The scores, minus infinity outside the `kept` best groups; a group is as good as the sum of its best two."""
    if kept == groups:
        return score_TE
    score_TNE = score_TE.unflatten(-1, (groups, -1))
    group_TN = score_TNE.topk(2, dim=-1).values.sum(-1)
    keep_TN = torch.zeros_like(group_TN, dtype=torch.bool).scatter_(-1, best(group_TN, kept), True)
    return score_TNE.masked_fill(~keep_TN[..., None], -torch.inf).flatten(1)


class Router(nn.Module):
    """Scores of all experts and the choice among them, see ExpertConfig.

    `row_tile` as in `losa_runtime.layers.linear`. A sigmoid's scores are float32 from the product on.
    """

    row_tile: int | None = None
    expert_bias: Tensor | None

    def __init__(self, hidden_size: int, experts: ExpertConfig) -> None:
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts.count, hidden_size))
        self.expert_bias = nn.Parameter(torch.empty(experts.count)) if experts.bias else None

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """Both parameters by their names; the bias decides between close scores and keeps all of its bits."""
        yield "weight", Piece("weight")
        if self.expert_bias is not None:
            yield "expert_bias", Piece("expert_bias", dtype=torch.float32)

    def forward(self, x_TC: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, C] -> chosen int64 [T, K], weight float32 [T, K]."""
        experts = self.experts
        if experts.score == "softmax":
            score_TE = linear(x_TC, self.weight, self.row_tile).softmax(-1, dtype=torch.float32)
        else:
            score_TE = linear(x_TC.float(), self.weight.float(), self.row_tile).sigmoid()
        choice_TE = score_TE if self.expert_bias is None else score_TE + self.expert_bias
        chosen_TK = best(within_groups(choice_TE, experts.groups, experts.kept_groups), experts.per_token)
        weight_TK = score_TE.gather(-1, chosen_TK)
        if experts.normalise:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        return chosen_TK, weight_TK * experts.scaling

"""Penalties and logit bias: what a request's own tokens and wishes do to its logits, before bans and temperature.

Definitions, in this order, for a row with logits l of a request whose output so far (tokens accepted in the current
block included) holds id i c(i) times:
1. repetition r, for each id that occurs in the prompt or the output:  l = l / r if l > 0 else l * r
   (Keskar et al. 2019, arXiv 1909.05858, eq. 1, in the sign-safe form that servers agree on);
2. frequency f and presence q:  l = l - f * c(i) - q * [c(i) > 0]  (the OpenAI API's definition: output only);
3. logit_bias b:  l = l + b(i).
Requests without any of these cost nothing. Knows no block and no sampling. Shape letters: R rows, V vocabulary,
N rows of one request, D distinct ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import SamplingParams


class PenaltyRows(NamedTuple):
    """The rows of one request that has penalties or a bias.

    rows: their numbers among the R rows. prompt_ids, output_ids: the request's tokens so far, the output with the
    tokens already accepted in the current block (never MASK).
    """

    rows: Sequence[int]
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    params: SamplingParams


def has_penalties(params: SamplingParams) -> bool:
    """True where `penalise` would change a row of a request with these parameters."""
    return counts_tokens(params) or bool(params.logit_bias)


def counts_tokens(params: SamplingParams) -> bool:
    """True where a row depends on the tokens that the request has so far."""
    return params.frequency_penalty != 0 or params.presence_penalty != 0 or params.repetition_penalty != 1


def check_logit_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequest for a biased id outside the vocabulary."""
    for token in params.logit_bias:
        if not 0 <= token < vocab_size:
            raise InvalidRequest("sampling_params.logit_bias", token, f"token ids from 0 to {vocab_size - 1}")


def penalise(logits_RV: Tensor, requests: Sequence[PenaltyRows]) -> Tensor:
    """The penalised logits: float32 [R, V], a new tensor; with no request to serve the very tensor that came in.

    Requests for which `has_penalties` is false are passed over. No row occurs in two requests.
    """
    requests = [r for r in requests if len(r.rows) and has_penalties(r.params)]
    if not requests:
        return logits_RV
    logits_RV = logits_RV.to(torch.float32, copy=True)
    for request in requests:
        _penalise_request(logits_RV, request)
    return logits_RV


def _penalise_request(logits_RV: Tensor, request: PenaltyRows) -> None:
    """Change one request's rows in place, touching only the ids concerned."""
    params, device = request.params, logits_RV.device
    row_N1 = torch.tensor(request.rows, dtype=torch.int64, device=device)[:, None]
    output = torch.tensor(request.output_ids, dtype=torch.int64, device=device)
    if params.repetition_penalty != 1:
        prompt = torch.tensor(request.prompt_ids, dtype=torch.int64, device=device)
        seen_D = torch.cat((prompt, output)).unique()
        logits_ND = logits_RV[row_N1, seen_D]
        r = params.repetition_penalty
        logits_RV[row_N1, seen_D] = torch.where(logits_ND > 0, logits_ND / r, logits_ND * r)
    if params.frequency_penalty != 0 or params.presence_penalty != 0:
        used_D, count_D = output.unique(return_counts=True)
        logits_RV[row_N1, used_D] -= params.frequency_penalty * count_D.float() + params.presence_penalty
    if params.logit_bias:
        biased_D = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)
        bias_D = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        logits_RV[row_N1, biased_D] += bias_D

"""One token for every row of logits, and how sure the model was of it. Knows no block, no request and no generator.

A row is one masked position of one request; rows of different requests carry their own parameters and never touch one
another: a row alone gives the same answer. Shape letters: R rows, V vocabulary, K best logits looked at.

Definitions, in this order, on the (already penalised) logits of a row:
1. banned ids become -inf: MASK, ids that the tokenizer does not have, and the row's own bans (EOS, stop ids);
2. temperature t > 0: p = softmax(logits / t). t = 0 is greedy: the greatest logit, ties to the lowest id, p at t = 1;
3. *confidence* is p[token] and *logprob* its natural logarithm: tempered, but before any filter (otherwise top_k = 1
   would make every token certain; the published SDAR evaluation reads it the same way);
4. the filters keep the n likeliest ids, ties to the lowest id; n is the least of
   top_k: k;  top_p: the fewest ids whose share of the top_k mass reaches top_p;  min_p: the ids with
   p >= min_p * max p;
5. the token is the first id, in vocabulary order, at which the cumulative sum of the kept p exceeds u * their total.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from losa_runtime.core.errors import LosaError

# Rows are worked on a few at a time: the working set in float64 stays below 256 MiB however many rows there are.
_ELEMENTS_PER_PASS = 1 << 22
# A nucleus rarely needs more of the vocabulary than this; where one does, everything is sorted.
_FIRST_WIDTH = 256
# Neighbouring ids whose shares are summed in float32.
_SPAN = 1024


class SamplingRows(NamedTuple):
    """Parameters per row, each [R] and on the device of the logits.

    temperature_R: float, 0 = greedy. top_k_R: int64, <= 0 or >= V = all. top_p_R: float in (0, 1], 1 = off.
    min_p_R: float in [0, 1], 0 = off. uniform_R: float64 in [0, 1), see `rng.uniform`.
    """

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    uniform_R: Tensor


class Bans(NamedTuple):
    """Ids that must not be sampled. mask_token_id and ids >= vocab_size (of the tokenizer): in every row.

    row_N, id_N: int64 [N], further (row, id) pairs: EOS and stop ids where ignore_eos or min_new_tokens forbid them.
    """

    mask_token_id: int
    vocab_size: int
    row_N: Tensor | None = None
    id_N: Tensor | None = None

    def of_rows(self, row_M: Tensor) -> Bans:
        """The bans of some rows, ascending, numbered anew."""
        if self.row_N is None or self.id_N is None:
            return self
        place_N = torch.searchsorted(row_M, self.row_N)
        mine_N = row_M[place_N.clamp(max=len(row_M) - 1)] == self.row_N
        return self._replace(row_N=place_N[mine_N], id_N=self.id_N[mine_N])


class Wanted(NamedTuple):
    """Further log-probabilities (definition 3) to be reported. Rows ascend in both lists.

    row_N: int64 [N], rows whose `top` likeliest ids are wanted. row_M, id_M: int64 [M], single (row, id) pairs.
    """

    top: int
    row_N: Tensor
    row_M: Tensor
    id_M: Tensor


class Others(NamedTuple):
    """What was `Wanted`. top_id_NK: int64, top_logprob_NK: float64 [N, K], likeliest first, K = top or all there are;
    logprob_M: float64 [M]. Minus infinity for banned ids."""

    top_id_NK: Tensor
    top_logprob_NK: Tensor
    logprob_M: Tensor


class Sampled(NamedTuple):
    """token_R: int64. confidence_R, logprob_R: float32, definition 3. If asked for: entropy_R, margin_R: float32, of
    the unfiltered, tempered p; others."""

    token_R: Tensor
    confidence_R: Tensor
    logprob_R: Tensor
    entropy_R: Tensor | None = None
    others: Others | None = None
    margin_R: Tensor | None = None


class Measures(NamedTuple):
    """What of p is reported beside the token. entropy: in nats. margin: of the likeliest id over the next."""

    entropy: bool = False
    margin: bool = False


class UnusableLogits(LosaError):
    """Rows from which nothing can be sampled: every id banned, or a logit that is NaN or +inf. `rows` names them."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        self.rows = rows
        super().__init__(f"no token can be sampled from rows {rows}: all ids banned, or logits not finite")


def sample(
    logits_RV: Tensor,
    rows: SamplingRows,
    bans: Bans,
    measures: Measures = Measures(),  # noqa: B008 - immutable
    wanted: Wanted | None = None,
) -> Sampled:
    """Sample one token per row, see the definitions above.

    logits_RV: any float dtype, not changed. measures: also report these of p (unfiltered, tempered). wanted: also
    report these log-probabilities.
    Raises UnusableLogits naming the rows; the others can be sampled again without them.
    """
    R, V = logits_RV.shape
    height = max(1, _ELEMENTS_PER_PASS // V)
    parts = [
        _sample_part(logits_RV, rows, bans, measures, wanted, start, start + height)
        for start in range(0, max(R, 1), height)
    ]
    token_R, logprob_R, usable_R, entropy_R, margin_R, *others = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    if not bool(usable_R.all()):
        raise UnusableLogits(tuple(torch.nonzero(~usable_R).flatten().tolist()))
    return Sampled(
        token_R,
        logprob_R.exp().float(),
        logprob_R.float(),
        entropy_R.float() if measures.entropy else None,
        Others(*others) if others else None,
        margin_R.float() if measures.margin else None,
    )


def log_probabilities(logits_RV: Tensor, rows: SamplingRows, bans: Bans) -> tuple[Tensor, Tensor]:
    """Definitions 1 to 4 for all ids: float64 log-probabilities [R, V], minus infinity for banned ids, and which of
    them the filters keep, bool [R, V]. Rows that cannot be sampled from are undefined."""
    logits_RV = _banned(logits_RV, bans, 0)
    logp_RV = _tempered(logits_RV, logits_RV.amax(-1), rows.temperature_R)
    kept_RV = _kept(logits_RV, logp_RV.exp(), rows) | (rows.temperature_R == 0)[:, None]
    return logp_RV, kept_RV


def _sample_part(
    logits_RV: Tensor, rows: SamplingRows, bans: Bans, measures: Measures, wanted: Wanted | None, start: int, stop: int
) -> tuple[Tensor, ...]:
    """(token, logprob, usable, entropy, margin, *others) of rows [start, stop), float64; logprob in the place of a
    measure that is not asked for, no others if none are wanted. Only what is drawn or asked for goes over the
    vocabulary in float64."""
    logits_RV = _banned(logits_RV[start:stop], bans, start)
    rows = SamplingRows(*(column[start:stop] for column in rows))
    token_R = logits_RV.argmax(-1)
    best_R = logits_RV.gather(-1, token_R[:, None])[:, 0]
    usable_R = torch.isfinite(best_R)
    logprob_R = -_log_total(logits_RV, best_R)  # of the greatest logit
    drawn_D = torch.nonzero((rows.temperature_R > 0) & usable_R).flatten()
    if len(drawn_D):
        drawn = SamplingRows(*(column[drawn_D] for column in rows))
        logits_DV = logits_RV[drawn_D]
        logp_DV = _tempered(logits_DV, best_R[drawn_D], drawn.temperature_R)
        token_D = _draw(logits_DV, logp_DV.exp(), drawn)
        token_R[drawn_D], logprob_R[drawn_D] = token_D, logp_DV.gather(-1, token_D[:, None])[:, 0]
    if not any(measures) and wanted is None:
        return token_R, logprob_R, usable_R, logprob_R, logprob_R
    logp_RV = _tempered(logits_RV, best_R, rows.temperature_R)
    others = () if wanted is None else _others(logp_RV, wanted, start)
    entropy_R = _entropy(logp_RV) if measures.entropy else logprob_R
    return token_R, logprob_R, usable_R, entropy_R, _margin(logp_RV) if measures.margin else logprob_R, *others


def _others(logp_RV: Tensor, wanted: Wanted, start: int) -> Others:
    """What is wanted of some rows; `start` is the number of the first."""
    stop = start + len(logp_RV)
    row_N = wanted.row_N[(wanted.row_N >= start) & (wanted.row_N < stop)] - start
    top_NK, id_NK = logp_RV[row_N].topk(min(wanted.top, logp_RV.shape[1]))
    here_M = (wanted.row_M >= start) & (wanted.row_M < stop)
    return Others(id_NK, top_NK, logp_RV[wanted.row_M[here_M] - start, wanted.id_M[here_M]])


def _tempered(logits_RV: Tensor, best_R: Tensor, temperature_R: Tensor) -> Tensor:
    """Log-probabilities at each row's temperature, float64. best_R: the greatest logit of each row."""
    tempered_R = torch.where(temperature_R > 0, temperature_R, 1.0).to(torch.float64)
    # The maximum is taken off first, so that no temperature can overflow to inf - inf.
    return ((logits_RV.to(torch.float64) - best_R[:, None]) / tempered_R[:, None]).log_softmax(-1)


def _log_total(logits_RV: Tensor, best_R: Tensor) -> Tensor:
    """log of the sum of exp(logit - best) of each row at temperature 1, float64 [R], to some 3e-7.

    Summed in float32 over short spans and in float64 over those: as good as all in float64, in a tenth of the time.
    The spans are the same for every number of rows, so that a row's sum does not depend on its company.
    """
    share_RV = (logits_RV - best_R[:, None]).exp_()
    whole = share_RV.shape[1] // _SPAN * _SPAN
    rest_R = share_RV[:, whole:].sum(-1).to(torch.float64)
    if not whole:
        return rest_R.log()
    spans_RN = share_RV[:, :whole].unflatten(1, (-1, _SPAN)).sum(-1)
    return (spans_RN.to(torch.float64).sum(-1) + rest_R).log()


def _entropy(logp_RV: Tensor) -> Tensor:
    # p * log p is 0 where p is 0, also for a banned id.
    return -(logp_RV.exp() * logp_RV.clamp(min=-1e300)).sum(-1)


def _margin(logp_RV: Tensor) -> Tensor:
    best_R2 = logp_RV.topk(2).values.exp()
    return best_R2[:, 0] - best_R2[:, 1]


def _banned(logits_RV: Tensor, bans: Bans, start: int) -> Tensor:
    """A float32 copy of some rows with -inf at the banned ids; `start` is the number of the first row."""
    logits_RV = logits_RV.to(torch.float32, copy=True)
    logits_RV[:, bans.vocab_size :] = -torch.inf
    logits_RV[:, bans.mask_token_id] = -torch.inf
    if bans.row_N is not None and bans.id_N is not None:
        here_N = (bans.row_N >= start) & (bans.row_N < start + len(logits_RV))
        logits_RV[bans.row_N[here_N] - start, bans.id_N[here_N]] = -torch.inf
    return logits_RV


def _draw(logits_RV: Tensor, p_RV: Tensor, rows: SamplingRows) -> Tensor:
    """Invert the cumulative distribution of the filtered p. p_RV: float64, sums to 1. Returns int64 [R]."""
    kept_RV = _kept(logits_RV, p_RV, rows) & (p_RV > 0)
    cumulative_RV = torch.where(kept_RV, p_RV, 0.0).cumsum(-1)
    # An id that is not kept can never be found, even if a parallel scan is not monotone to the last bit.
    cumulative_RV = cumulative_RV.masked_fill(~kept_RV, -1.0)
    target_R = rows.uniform_R.to(torch.float64) * cumulative_RV.amax(-1)
    return (cumulative_RV > target_R[:, None]).to(torch.uint8).argmax(-1)


def _kept(logits_RV: Tensor, p_RV: Tensor, rows: SamplingRows) -> Tensor:
    """bool [R, V]: the ids that pass the filters (definition 4)."""
    V = logits_RV.shape[1]
    top_k_R = torch.where(rows.top_k_R > 0, rows.top_k_R, V).clamp(max=V)
    if bool(((top_k_R == V) & (rows.top_p_R >= 1) & (rows.min_p_R <= 0)).all()):
        return torch.ones_like(logits_RV, dtype=torch.bool)
    widest_k = int(torch.where(top_k_R < V, top_k_R, 0).amax())
    for width in (min(max(_FIRST_WIDTH, widest_k), V), V):
        best_RK, id_RK = logits_RV.topk(width) if width < V else logits_RV.sort(descending=True)
        count_R = _count(p_RV.gather(-1, id_RK), top_k_R, V, rows)
        if width == V or bool((count_R < width).all()):
            break
    # The n likeliest with ties to the lowest id; the order among equals that a sort happens to give does not matter.
    least_R1 = best_RK.gather(-1, count_R[:, None] - 1)
    above_RV, equal_RV = logits_RV > least_R1, logits_RV == least_R1
    room_R1 = count_R[:, None] - above_RV.sum(-1, keepdim=True)
    return above_RV | (equal_RV & (equal_RV.cumsum(-1) <= room_R1))


def _count(p_RK: Tensor, top_k_R: Tensor, V: int, rows: SamplingRows) -> Tensor:
    """How many of the K likeliest ids the filters keep, at least 1; K itself means "K or more" where K < V.

    Every top_k is at most K, or V (= all): the mass that top_p refers to is then 1.
    """
    K = p_RK.shape[1]
    cumulative_RK = p_RK.cumsum(-1)
    top_k_R1 = top_k_R[:, None]
    mass_R1 = torch.where(top_k_R1 < V, cumulative_RK.gather(-1, top_k_R1.clamp(max=K) - 1), 1.0)
    top_p_R1 = rows.top_p_R.to(torch.float64)[:, None]
    in_nucleus_RK = (cumulative_RK - p_RK < top_p_R1 * mass_R1) | (top_p_R1 >= 1)
    likely_RK = p_RK >= rows.min_p_R.to(torch.float64)[:, None] * p_RK[:, :1]
    rank_K = torch.arange(K, device=p_RK.device)
    kept_RK = in_nucleus_RK & likely_RK & (rank_K < top_k_R1)
    return kept_RK.sum(-1).clamp(min=1)

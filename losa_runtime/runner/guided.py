"""Tokens for the blocks of requests whose output must match a grammar: where `decoding` meets `grammar`.

Two modes, both exact: whatever is accepted in a step leaves a way to an output that matches within its tokens.
*map*: the most probable usable path through the whole block (drawn instead, with temperature) gives every hole its
candidate; all candidates fit together, so any of them may be accepted. *valid*: every hole has its own best (or drawn)
token among those that some usable path has there; accepted ones are settled one after the other, the surest first, and
one that an earlier one has ruled out is chosen again.

Confidence is the model's probability among the tokens that are allowed at a hole, so that what is forced is sure.
Behind the end of an output nothing is asked any more, and such holes come last. The log-probability that is reported is
the model's own. What top_k, top_p and min_p filter out is taken only where nothing else is usable.
R rows (holes) of all segments, n holes of one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losa_runtime.core.work import Ids, WorkItem
from losa_runtime.decoding.sampling import Bans, Sampled, SamplingRows, log_probabilities
from losa_runtime.grammar.block_paths import Reach, best_path, draw_path
from losa_runtime.grammar.guide import OutputGuide

FILTERED = 1e4  # taken off a log-probability: far below anything else, and still in order

Floats = NDArray[np.float64]


class HoleRows(NamedTuple):
    """One segment's holes: logp, log-probabilities float64 [n, V], minus infinity = banned; p: float32, their
    exponentials; kept, bool [n, V], those that the filters leave; uniform, a random number in [0, 1) per hole; drawn:
    with temperature."""

    logp_nV: Floats
    p_nV: NDArray[np.float32]
    kept_nV: NDArray[np.bool_]
    uniform_n: Floats
    drawn: bool


class Proposal(NamedTuple):
    """Candidates of one segment's holes: tokens int64 [n], confidence and logprob float64 [n]."""

    tokens: Ids
    confidence: Floats
    logprob: Floats


class GuidedBlocks:
    """The segments among `items` that have a grammar; false if there are none. Rows are the holes of all segments."""

    def __init__(self, items: Sequence[WorkItem]) -> None:
        self._blocks: list[tuple[slice, GuidedBlock]] = []
        self._proposals: list[Proposal] = []
        start = 0
        for item in items:
            assert item.candidates is not None and item.context is not None
            rows = slice(start, start + item.candidates.size)
            if item.context.guide is not None:
                self._blocks.append((rows, GuidedBlock(item)))
            start = rows.stop

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def propose(self, sampled: Sampled, logits_RV: Tensor, rows: SamplingRows, bans: Bans) -> Sampled:
        """What was sampled, with the candidates of guided segments in place of theirs."""
        columns = [x.clone() for x in (sampled.token_R, sampled.confidence_R, sampled.logprob_R)]
        mine = torch.cat([torch.arange(where.start, where.stop) for where, _ in self._blocks]).to(logits_RV.device)
        some = SamplingRows(*(column[mine] for column in rows))
        logp_nV, kept_nV = log_probabilities(logits_RV[mine], some, bans.of_rows(mine))
        p = logp_nV.float().exp().cpu().numpy()
        logp, kept, uniform = logp_nV.cpu().numpy(), kept_nV.cpu().numpy(), some.uniform_R.double().cpu().numpy()
        drawn = (some.temperature_R > 0).cpu().numpy()
        first = 0
        for where, block in self._blocks:
            part = slice(first, first + where.stop - where.start)
            first = part.stop
            found = block.propose(HoleRows(logp[part], p[part], kept[part], uniform[part], bool(drawn[part].any())))
            self._proposals.append(found)
            for column, values in zip(columns, found, strict=True):
                column[where] = torch.from_numpy(values).to(column)
        return sampled._replace(token_R=columns[0], confidence_R=columns[1], logprob_R=columns[2])

    def settle(self, accepted_R: NDArray[np.bool_], token_R: Ids, logprob_R: Floats) -> None:
        """Write the tokens of guided segments' accepted rows so that they fit together."""
        for (where, block), proposal in zip(self._blocks, self._proposals, strict=True):
            settled = block.settle(proposal, accepted_R[where])
            token_R[where], logprob_R[where] = settled.tokens, settled.logprob


class GuidedBlock:
    """One block segment in one denoising step."""

    def __init__(self, item: WorkItem) -> None:
        assert item.context is not None and item.candidates is not None
        guide, sampling = item.context.guide, item.context.sampling
        assert isinstance(guide, OutputGuide)
        self._guide, self._output = guide, item.context.output
        self._mode = sampling.custom_params.grammar_mode or "map"
        size = item.candidates.size + item.unmasked
        self._block = item.tokens[item.known : item.known + size].copy()
        self._holes = item.candidates - item.known
        self._block[self._holes] = -1
        self._reach = guide.reach(self._output, self._block)
        assert self._reach.possible, "a block from which its output cannot match any more"
        self._rows: HoleRows | None = None

    def propose(self, rows: HoleRows) -> Proposal:
        """A candidate for every hole."""
        self._rows = rows
        if self._mode == "map":
            return self._along_a_path(rows)
        found = [self._at(self._reach, n) for n in range(self._holes.size)]
        return Proposal(*(np.array(column) for column in zip(*found, strict=True)))

    def settle(self, proposal: Proposal, accepted: NDArray[np.bool_]) -> Proposal:
        """The proposal, with accepted tokens that fit together."""
        if self._mode == "map":
            return proposal
        tokens, logprob = proposal.tokens.copy(), proposal.logprob.copy()
        block, reach = self._block.copy(), self._reach
        order = np.argsort(-proposal.confidence, kind="stable")
        for n in order[accepted[order]].tolist():
            hole = int(self._holes[n])
            if not reach.allowed(hole)[tokens[n]]:
                tokens[n], _, logprob[n] = self._at(reach, n)
            block[hole] = tokens[n]
            reach = self._guide.reach(self._output, block)
        return Proposal(tokens, proposal.confidence, logprob)

    def _along_a_path(self, rows: HoleRows) -> Proposal:
        weights = _filtered(rows)
        logp = {int(hole): weights[n] for n, hole in enumerate(self._holes)}
        if rows.drawn:
            uniform = {int(hole): float(rows.uniform_n[n]) for n, hole in enumerate(self._holes)}
            path = draw_path(self._reach, logp, uniform)
        else:
            path = best_path(self._reach, logp)
        tokens = path[self._holes]
        every = np.arange(tokens.size)
        logprob = rows.logp_nV[every, tokens]
        allowed = (self._reach.allowed(int(hole)) for hole in self._holes)
        confidence = np.array([self._confidence(n, int(tokens[n]), mine_V) for n, mine_V in enumerate(allowed)])
        confidence[self._holes > _end(path, self._guide)] = 0.0
        return Proposal(tokens, confidence, _usable(logprob))

    def _at(self, reach: Reach, n: int) -> tuple[int, float, float]:
        """Token, confidence and log-probability of one hole by itself."""
        assert self._rows is not None
        hole, logp = int(self._holes[n]), self._rows.logp_nV[n]
        allowed_V = reach.allowed(hole)
        ids = np.flatnonzero(allowed_V)
        weights = _filtered(self._rows, n)[ids]
        if not np.isfinite(weights).any():
            pick = 0
        elif self._rows.drawn:
            cumulative = np.exp(weights - weights.max()).cumsum()
            pick = int(np.searchsorted(cumulative, self._rows.uniform_n[n] * cumulative[-1], side="right"))
        else:
            pick = int(np.argmax(weights))
        token = int(ids[pick])
        confidence = 0.0 if reach.only_done(hole) else self._confidence(n, token, allowed_V)
        return token, confidence, float(_usable(logp[token : token + 1])[0])

    def _confidence(self, n: int, token: int, allowed_V: NDArray[np.bool_]) -> float:
        assert self._rows is not None
        p = self._rows.p_nV[n]
        total = float(p[: allowed_V.size] @ allowed_V.astype(np.float32))  # behind lies padding
        return min(1.0, float(p[token]) / total) if total > 0.0 else 1.0 / int(allowed_V.sum())


def _end(path: Ids, guide: OutputGuide) -> int:
    """Where the path ends its output, its length if nowhere."""
    ends = np.flatnonzero(np.isin(path, guide.automaton.ends))
    return int(ends[0]) if ends.size else int(path.size)


def _filtered(rows: HoleRows, n: int | None = None) -> Floats:
    logp, kept = (rows.logp_nV, rows.kept_nV) if n is None else (rows.logp_nV[n], rows.kept_nV[n])
    return np.where(kept, logp, logp - FILTERED)


def _usable(logprob: Floats) -> Floats:
    """Finite: a token that only the grammar wanted may have had no probability at all."""
    return np.maximum(logprob, -FILTERED)

"""Tokens for the holes of guided blocks, by the C++ kernels, or by numpy where they are missing: the reference.

What is chosen and why stands in `guided`. The two differ in one thing: where a state allows very many tokens, the
kernels judge a hole by its likeliest ones, and count all others as allowed.
n holes of all blocks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from losa_kernels.native.guided import BlockChoices, Blocks, Grammar
from losa_runtime.core.work import Ids, WorkItem
from losa_runtime.grammar.block_paths import Block, Reach, best_path, draw_path
from losa_runtime.grammar.guide import OutputGuide
from losa_runtime.grammar.token_automaton import TokenAutomaton

FILTERED = 1e4  # taken off a log-probability: far below anything else, and still in order

Floats = NDArray[np.float64]


class HoleRows(NamedTuple):
    """Of every hole: logits float32 [n, at least V]; kept, bool of that shape, what the filters leave (None: all);
    sharpness, one by the temperature; total, the logarithm of the sum of e^(sharpness * logit); uniform in [0, 1)."""

    logits_nV: NDArray[np.float32]
    kept_nV: NDArray[np.bool_] | None
    sharpness_n: Floats
    total_n: Floats
    uniform_n: Floats


class GuidedBlock(NamedTuple):
    """One block segment in one step. block: with -1 for holes; holes: their positions in it; path: mode map; drawn:
    with temperature."""

    guide: OutputGuide
    block: Block
    holes: Ids
    path: bool
    drawn: bool

    @classmethod
    def of(cls, item: WorkItem) -> GuidedBlock:
        """That of a segment."""
        assert item.context is not None and item.candidates is not None
        guide, sampling = item.context.guide, item.context.sampling
        assert isinstance(guide, OutputGuide)
        tokens: Ids = np.full(item.candidates.size + item.unmasked, -1, dtype=np.int64)
        own = item.tokens[item.known : item.known + tokens.size]  # none, where a stored block asks what lies behind it
        tokens[: own.size] = own
        holes = item.candidates - item.known
        tokens[holes] = -1
        path = sampling.custom_params.grammar_mode != "valid"
        return cls(guide, guide.block(item.context.output, tokens), holes, path, sampling.temperature > 0)


class Proposal(NamedTuple):
    """Candidates of holes: tokens int64, confidence and logprob float64, [n] each."""

    tokens: Ids
    confidence: Floats
    logprob: Floats


class Choices(Protocol):
    """What is chosen for the holes of some blocks, and what becomes of it when some are accepted."""

    proposal: Proposal

    def settle(self, accepted: NDArray[np.bool_]) -> Proposal:
        """The proposal, with accepted tokens that fit together."""


class NativeChoices:
    """By the kernels, for all blocks in one call. Their guides hold a `Grammar`."""

    def __init__(self, blocks: Sequence[GuidedBlock], rows: HoleRows) -> None:
        grammars = [block.guide.automaton for block in blocks]
        mine = [grammar for grammar in grammars if isinstance(grammar, Grammar)]
        assert len(mine) == len(blocks), "guides of two kinds in one step"
        tokens, states, rooms = zip(*(block.block for block in blocks), strict=True)
        path, drawn = [block.path for block in blocks], [block.drawn for block in blocks]
        self._choices = BlockChoices(mine[0].kernels, Blocks(mine, tokens, states, rooms, path, drawn, *rows))
        self._settles = not all(path)
        self.proposal = Proposal(*self._choices.chosen)

    def settle(self, accepted: NDArray[np.bool_]) -> Proposal:
        """See Choices."""
        return Proposal(*self._choices.settle(accepted)) if self._settles else self.proposal


class ReferenceChoices:
    """By numpy, block by block. Their guides hold a `TokenAutomaton`."""

    def __init__(self, blocks: Sequence[GuidedBlock], rows: HoleRows) -> None:
        ends = np.cumsum([block.holes.size for block in blocks])
        self._parts = [slice(end - block.holes.size, end) for block, end in zip(blocks, ends.tolist(), strict=True)]
        self._blocks = [
            _Choosing(block, *(None if column is None else column[part] for column in rows))  # type: ignore[arg-type]
            for block, part in zip(blocks, self._parts, strict=True)
        ]
        self.proposal = _joined([block.propose() for block in self._blocks])

    def settle(self, accepted: NDArray[np.bool_]) -> Proposal:
        """See Choices."""
        tokens, confidence, logprob = self.proposal
        mine = zip(self._blocks, self._parts, strict=True)
        return _joined(
            [
                block.settle(Proposal(tokens[part], confidence[part], logprob[part]), accepted[part])
                for block, part in mine
            ]
        )


def _joined(proposals: Sequence[Proposal]) -> Proposal:
    return Proposal(*(np.concatenate(columns) for columns in zip(*proposals, strict=True)))


class _Choosing:
    """One block."""

    def __init__(
        self,
        block: GuidedBlock,
        logits_nV: NDArray[np.float32],
        kept_nV: NDArray[np.bool_] | None,
        sharpness_n: Floats,
        total_n: Floats,
        uniform_n: Floats,
    ) -> None:
        assert isinstance(block.guide.automaton, TokenAutomaton)
        self._automaton, self._block, self._holes = block.guide.automaton, block.block, block.holes
        self._path, self._drawn, self._uniform = block.path, block.drawn, uniform_n
        self._logp = logits_nV.astype(np.float64) * sharpness_n[:, None] - total_n[:, None]
        self._weights = self._logp if kept_nV is None else np.where(kept_nV, self._logp, self._logp - FILTERED)
        self._reach = Reach(self._automaton, self._block)
        assert self._reach.possible, "a block from which its output cannot match any more"

    def propose(self) -> Proposal:
        """A candidate for every hole."""
        if self._path:
            return self._along_a_path()
        found = [self._at(self._reach, n) for n in range(self._holes.size)]
        return Proposal(*(np.array(column) for column in zip(*found, strict=True)))

    def settle(self, proposal: Proposal, accepted: NDArray[np.bool_]) -> Proposal:
        """The proposal, with accepted tokens that fit together."""
        if self._path:
            return proposal
        tokens, logprob = proposal.tokens.copy(), proposal.logprob.copy()
        block, reach = self._block.tokens.copy(), self._reach
        order = np.argsort(-proposal.confidence, kind="stable")
        for n in order[accepted[order]].tolist():
            hole = int(self._holes[n])
            if not reach.allowed(hole)[tokens[n]]:
                tokens[n], _, logprob[n] = self._at(reach, n)
            block[hole] = tokens[n]
            reach = Reach(self._automaton, self._block._replace(tokens=block.copy()))
        return Proposal(tokens, proposal.confidence, logprob)

    def _along_a_path(self) -> Proposal:
        logp = {int(hole): self._weights[n] for n, hole in enumerate(self._holes)}
        if self._drawn:
            uniform = {int(hole): float(self._uniform[n]) for n, hole in enumerate(self._holes)}
            path = draw_path(self._reach, logp, uniform)
        else:
            path = best_path(self._reach, logp)
        tokens = path[self._holes]
        logprob = self._logp[np.arange(tokens.size), tokens]
        allowed = (self._reach.allowed(int(hole)) for hole in self._holes)
        confidence = np.array([self._confidence(n, int(tokens[n]), mine_V) for n, mine_V in enumerate(allowed)])
        ends = np.flatnonzero(np.isin(path, self._automaton.ends))
        confidence[self._holes > (ends[0] if ends.size else path.size)] = 0.0
        return Proposal(tokens, confidence, _usable(logprob))

    def _at(self, reach: Reach, n: int) -> tuple[int, float, float]:
        """Token, confidence and log-probability of one hole by itself."""
        hole, logp = int(self._holes[n]), self._logp[n]
        allowed_V = reach.allowed(hole)
        ids = np.flatnonzero(allowed_V)
        weights = self._weights[n][ids]
        if not np.isfinite(weights).any():
            pick = 0
        elif self._drawn:
            cumulative = np.exp(weights - weights.max()).cumsum()
            pick = int(np.searchsorted(cumulative, self._uniform[n] * cumulative[-1], side="right"))
        else:
            pick = int(np.argmax(weights))
        token = int(ids[pick])
        confidence = 0.0 if reach.only_done(hole) else self._confidence(n, token, allowed_V)
        return token, confidence, float(_usable(logp[token : token + 1])[0])

    def _confidence(self, n: int, token: int, allowed_V: NDArray[np.bool_]) -> float:
        p = np.exp(self._logp[n, : allowed_V.size])  # behind lies padding
        total = float(p @ allowed_V)
        return min(1.0, float(p[token]) / total) if total > 0.0 else 1.0 / int(allowed_V.sum())


def _usable(logprob: Floats) -> Floats:
    """Finite: a token that only the grammar wanted may have had no probability at all."""
    return np.maximum(logprob, -FILTERED)

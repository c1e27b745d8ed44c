"""Tokens for the blocks of requests whose output must match a grammar: where `decoding` meets `grammar`.

Two modes, both exact: whatever is accepted in a step leaves a way to an output that matches within its tokens.
*map*: the most probable usable path through the whole block (drawn instead, with temperature) gives every hole its
candidate; all candidates fit together, so any of them may be accepted. *valid*: every hole has its own best (or drawn)
token among those that some usable path has there; accepted ones are settled one after the other, the surest first, and
one that an earlier one has ruled out is chosen again. Which is better, and why *map* is the default, was measured
(benchmarks/LOG.md): a path weighs a block as a whole and leans towards short outputs, as what is not written costs
nothing; with few fixed greedy steps the holes' own tokens are the better ones.

Confidence is the model's probability among the tokens that are allowed at a hole, so that what is forced is sure.
Behind the end of an output nothing is asked any more, and such holes come last. The log-probability that is reported is
the model's own. What top_k, top_p and min_p filter out is taken only where nothing else is usable.
R rows (holes) of all segments, n holes of guided ones, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losa_kernels.native.guided import Grammar
from losa_runtime.core.errors import LosaError
from losa_runtime.core.work import Ids, WorkItem
from losa_runtime.decoding.sampling import Bans, Sampled, SamplingRows, log_probabilities
from losa_runtime.runner.choices import Choices, Floats, GuidedBlock, HoleRows, NativeChoices, ReferenceChoices
from losa_runtime.runner.windows import asked


class Unguided(LosaError):
    """Segments, by their numbers among all, whose grammars cannot be followed through their blocks, and why."""

    def __init__(self, reasons: dict[int, str]) -> None:
        self.reasons = reasons
        super().__init__("; ".join(reasons.values()))


class GuidedBlocks:
    """The segments among `items` that have a grammar; false if there are none. Rows are the holes of all segments."""

    def __init__(self, items: Sequence[WorkItem]) -> None:
        self._items: list[WorkItem] = []
        self._numbers: list[int] = []
        self._rows: list[NDArray[np.int64]] = []
        self._chosen: Choices | None = None
        start = 0
        for number, item in enumerate(items):
            assert item.context is not None
            size = asked(item).size
            if item.context.guide is not None:
                self._items.append(item)
                self._numbers.append(number)
                self._rows.append(np.arange(start, start + size))
            start += size

    def __bool__(self) -> bool:
        return bool(self._items)

    def propose(self, sampled: Sampled, logits_RV: Tensor, rows: SamplingRows, bans: Bans) -> Sampled:
        """What was sampled, with the candidates of guided segments in place of theirs. Raises Unguided."""
        mine = torch.from_numpy(np.concatenate(self._rows)).to(logits_RV.device)
        mine_V = logits_RV if mine.numel() == len(logits_RV) else logits_RV[mine]
        some = SamplingRows(*(column[mine] for column in rows))
        kept_nV = None
        if any(_filters(item) for item in self._items):
            kept_nV = log_probabilities(mine_V, some, bans.of_rows(mine))[1].cpu().numpy()
        chosen = sampled.token_R[mine]
        sharpness = 1.0 / torch.where(some.temperature_R > 0, some.temperature_R, 1.0).double()
        # The logarithm of a row's total is what the log-probability of any of its tokens lacks.
        total = mine_V.gather(1, chosen[:, None])[:, 0].double() * sharpness - sampled.logprob_R[mine].double()
        columns = (x.double().cpu().numpy() for x in (sharpness, total, some.uniform_R))
        holes = HoleRows(mine_V.float().cpu().numpy(), kept_nV, *columns)
        blocks = [GuidedBlock.of(item) for item in self._items]
        try:
            self._chosen = _choices(blocks, holes)
        except ValueError:
            raise self._blame(blocks, holes) from None
        found = self._chosen.proposal
        replaced = [x.clone() for x in (sampled.token_R, sampled.confidence_R, sampled.logprob_R)]
        for column, values in zip(replaced, found, strict=True):
            column[mine] = torch.from_numpy(values).to(column)
        return sampled._replace(token_R=replaced[0], confidence_R=replaced[1], logprob_R=replaced[2])

    def _blame(self, blocks: Sequence[GuidedBlock], holes: HoleRows) -> Unguided:
        """Which of the blocks were refused: each is tried alone."""
        reasons: dict[int, str] = {}
        ends = np.cumsum([block.holes.size for block in blocks])
        for number, block, end in zip(self._numbers, blocks, ends.tolist(), strict=True):
            mine = slice(end - block.holes.size, end)
            try:
                _choices([block], HoleRows(*(None if column is None else column[mine] for column in holes)))  # type: ignore[arg-type]
            except ValueError as reason:
                reasons[number] = str(reason)
        assert reasons, "blocks that are refused together only"
        return Unguided(reasons)

    def settle(self, accepted_R: NDArray[np.bool_], token_R: Ids, logprob_R: Floats) -> None:
        """Write the tokens of guided segments' accepted rows so that they fit together."""
        if self._chosen is not None:
            mine = np.concatenate(self._rows)
            settled = self._chosen.settle(accepted_R[mine])
            token_R[mine], logprob_R[mine] = settled.tokens, settled.logprob


def _choices(blocks: Sequence[GuidedBlock], holes: HoleRows) -> Choices:
    native = isinstance(blocks[0].guide.automaton, Grammar)
    return NativeChoices(blocks, holes) if native else ReferenceChoices(blocks, holes)


def _filters(item: WorkItem) -> bool:
    assert item.context is not None
    sampling = item.context.sampling
    return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)

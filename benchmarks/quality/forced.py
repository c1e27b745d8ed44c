"""Asks for late keys: the sentence is written for the model, and what counts is whether it knows the code by then.

A code is right if each digit is the likeliest token at the step that reveals it. As the digits before it are the true
ones whenever it matters, this is what greedy decoding from left to right would write.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.quality.runner import Answer, Runner
from benchmarks.quality.samples import Asked
from benchmarks.quality.scripts import Revealed, late_keys, per_step
from benchmarks.quality.stage import Stage
from losa_runtime.core.batch import SparseParams
from losa_runtime.core.work import SegmentCost
from losa_runtime.scheduler.costs import CostSum
from losa_runtime.sparse.density import SegmentReport


class Forced:
    """One engine for all settings, driven block by block."""

    def __init__(self, runner: Runner) -> None:
        self._stage, self._encode = Stage(runner), runner.llm.tokenizer.encode

    def ask(self, document: Asked, settings: Sequence[SparseParams]) -> list[list[Answer]]:
        """Answers per setting, in the order of the document's questions."""
        found: list[list[Answer]] = [[] for _ in settings]
        for script in late_keys(document, self._encode, self._stage.block):
            assert script.order is not None
            self._stage.store(script.stored)
            # Not more at once than there are slots.
            for at in range(0, len(settings), self._stage.slots):
                some = slice(at, at + self._stage.slots)
                answers = self._play(Revealed(script, script.order), settings[some])
                for mine, answer in zip(found[some], answers, strict=True):
                    mine.append(answer)
        return found

    def _play(self, revealed: Revealed, settings: Sequence[SparseParams]) -> list[Answer]:
        stage, script = self._stage, revealed.script
        costs = [CostSum() for _ in settings]
        right = [True for _ in settings]
        latest: tuple[int, ...] = ()
        for step, counting in enumerate(per_step(revealed.order, script.scored)):
            shown = stage.show(settings, revealed.tokens(step, stage.mask), step, revealed.unmasked(step))
            best_SB = shown.logprobs_SBV.argmax(-1).tolist()
            for s, report in enumerate(shown.reports):
                costs[s].add_step(_cost(report), first=step == 0, unmasked=latest)
                right[s] &= all(best_SB[s][offset] == script.tokens[offset] for offset in counting)
            latest = revealed.order[step]
        stage.end()
        for cost in costs:
            cost.blocks = 1
        return [Answer(hit, "", cost.stats()) for hit, cost in zip(right, costs, strict=True)]


def _cost(report: SegmentReport) -> SegmentCost:
    return SegmentCost(
        density_kv=report.kv_density,
        density_q=report.kv_density_q,
        active=report.row_shares,
        dense=report.dense,
        kv_bytes=report.kv_bytes,
        metadata_bytes=report.metadata_bytes,
        dense_bytes=report.dense_bytes,
    )

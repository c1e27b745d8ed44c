"""From hidden states to accepted tokens: logits of the masked rows only, sampling, and each request's own algorithm.

Rows of many requests go through the vocabulary projection a few at a time, so memory does not grow with the batch.
Knows no pages and no attention. Shape letters: R rows, C hidden, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losa_runtime.cache.transfer import queued, to_device, vectors_to_device
from losa_runtime.core.batch import ForwardMode
from losa_runtime.core.request import Alternatives
from losa_runtime.core.work import BlockResult, Ids, RowContext, WorkItem, nothing
from losa_runtime.decoding.algorithm import Candidates, DecodingAlgorithm, Verdict, accept
from losa_runtime.decoding.penalties import PenaltyRows, has_penalties, penalise
from losa_runtime.decoding.registry import load_algorithm
from losa_runtime.decoding.rng import ORDER_STREAM, uniform
from losa_runtime.decoding.sampling import Bans, Measures, Sampled, SamplingRows, UnusableLogits, sample
from losa_runtime.models.model import BlockDiffusionModel
from losa_runtime.runner.alternatives import of_score, per_row, wanted
from losa_runtime.runner.guided import GuidedBlocks, Unguided
from losa_runtime.runner.windows import asked, plan, unmaskable

logger = logging.getLogger(__name__)

# Elements of one chunk of float32 logits (256 MiB).
_LOGITS_PER_CHUNK = 1 << 26
_UNUSABLE = "the model's logits for this request are not finite (or every token is banned); the request was ended"
_UNGUIDED = "the constraint allows too many ways through one block over this vocabulary; a simpler one is needed"


class Unmasker:
    """Samples the candidates of block segments and decides which are accepted.

    vocab_size: ids from here on are padding of the vocabulary and never sampled.
    """

    def __init__(self, model: BlockDiffusionModel, mask_token_id: int, vocab_size: int, block_length: int) -> None:
        self.model, self.mask_token_id, self.vocab_size = model, mask_token_id, vocab_size
        self.block_length = block_length
        self.rows_per_chunk = max(block_length, _LOGITS_PER_CHUNK // model.config.vocab_size)

    def __call__(self, items: Sequence[WorkItem], first_rows: Sequence[int], hidden_TC: Tensor) -> list[BlockResult]:
        """One result per segment. first_rows: where the rows of each begin in hidden_TC.

        With shifted logits the row before a candidate speaks for it; no candidate is its segment's first position.
        """
        shift = int(self.model.shifted_logits)
        results: dict[int, BlockResult] = {}
        for chunk in self._chunks(items):
            rows = np.concatenate([asked(items[s]) + first_rows[s] for s in chunk]) - shift
            logits_RV = self.model.logits(hidden_TC[torch.from_numpy(rows).to(hidden_TC.device)])
            results.update(self._decide(items, chunk, logits_RV))
        return [results[s] for s in range(len(items))]

    def _chunks(self, items: Sequence[WorkItem]) -> Iterator[list[int]]:
        """Segments whose candidates fit in one chunk of logits; scored and denoised segments never share one."""
        chunk: list[int] = []
        rows = 0
        for s, item in enumerate(items):
            size = asked(item).size
            changes = bool(chunk) and (item.mode is ForwardMode.SCORE) != (items[chunk[-1]].mode is ForwardMode.SCORE)
            if chunk and (rows + size > self.rows_per_chunk or changes):
                yield chunk
                chunk, rows = [], 0
            chunk.append(s)
            rows += size
        if chunk:
            yield chunk

    def _decide(self, items: Sequence[WorkItem], chunk: list[int], logits_RV: Tensor) -> dict[int, BlockResult]:
        if items[chunk[0]].mode is ForwardMode.SCORE:
            return self._score(items, chunk, logits_RV)
        mine = [items[s] for s in chunk]
        sizes = [asked(item).size for item in mine]
        guided = GuidedBlocks(mine)
        owners = np.repeat(np.arange(len(chunk)), sizes)
        try:
            sampled = self._sample(mine, sizes, logits_RV, guided)
        except UnusableLogits as error:
            bad = {int(owners[row]): nothing(_UNUSABLE) for row in error.rows}
            return self._without(items, chunk, logits_RV, owners, bad)
        except Unguided as error:
            logger.warning("a constraint cannot be followed: %s", error)
            bad = {i: nothing(_UNGUIDED, refused=True) for i in error.reasons}
            return self._without(items, chunk, logits_RV, owners, bad)
        accepted_R, finished_S = (yes.cpu().numpy() for yes in self._accept(mine, sizes, sampled))
        token_R, logprob_R = sampled.token_R.cpu().numpy(), sampled.logprob_R.double().cpu().numpy()
        guided.settle(accepted_R, token_R, logprob_R)
        contexts = [_context(item) for item in mine]
        others = None if sampled.others is None else per_row(contexts, sizes, sampled.others)
        results = {}
        start = 0
        for s, item, size, finished in zip(chunk, mine, sizes, finished_S.tolist(), strict=True):
            rows = slice(start, start + size)
            yes = accepted_R[rows]
            results[s] = BlockResult(
                asked(item)[yes],
                token_R[rows][yes],
                logprob_R[rows][yes],
                alternatives=None if others is None else _chosen(others[rows], yes),
                finished=finished,
            )
            start += size
        return results

    def _without(
        self,
        items: Sequence[WorkItem],
        chunk: list[int],
        logits_RV: Tensor,
        owners: NDArray[np.int64],
        bad: Mapping[int, BlockResult],
    ) -> dict[int, BlockResult]:
        """The results of a chunk of which some segments, by their places in it, have theirs already. owners: the place
        of each row's segment."""
        results = {chunk[i]: result for i, result in bad.items()}
        good = [i for i in range(len(chunk)) if i not in bad]
        if good:
            keep = torch.from_numpy(~np.isin(owners, list(bad))).to(logits_RV.device)
            results.update(self._decide(items, [chunk[i] for i in good], logits_RV[keep]))
        return results

    def _score(self, items: Sequence[WorkItem], chunk: list[int], logits_RV: Tensor) -> dict[int, BlockResult]:
        """Log-probability of each segment's target at its one candidate, over what can be sampled at all."""
        logits_RV[:, self.vocab_size :] = -torch.inf
        logits_RV[:, self.mask_token_id] = -torch.inf
        target_R1 = torch.tensor([[items[s].target] for s in chunk], device=logits_RV.device)
        logp_RV = logits_RV.double().log_softmax(-1)
        logprob_R = logp_RV.gather(-1, target_R1)[:, 0].cpu().numpy()
        results: dict[int, BlockResult] = {}
        for row, (s, logprob) in enumerate(zip(chunk, logprob_R, strict=True)):
            item = items[s]
            others = of_score(_context(item), logp_RV[row])
            result = BlockResult(
                asked(item),
                np.array([item.target]),
                np.array([logprob]),
                alternatives=None if others is None else (others,),
            )
            results[s] = result if np.isfinite(logprob) else nothing(_UNUSABLE)
        return results

    def _sample(
        self, items: Sequence[WorkItem], sizes: Sequence[int], logits_RV: Tensor, guided: GuidedBlocks
    ) -> Sampled:
        device = logits_RV.device
        contexts = [_context(item) for item in items]

        def per_row(values: Sequence[float | int], dtype: torch.dtype) -> Tensor:
            return to_device(np.repeat(values, sizes), dtype, device)

        position_R = queued(torch.from_numpy(np.concatenate([asked(item) + item.start for item in items])), device)
        seed_R = per_row([c.seed for c in contexts], torch.int64)
        step_R = per_row([item.step for item in items], torch.int64)
        rows = SamplingRows(
            temperature_R=per_row([c.sampling.temperature for c in contexts], torch.float32),
            top_k_R=per_row([c.sampling.top_k for c in contexts], torch.int64),
            top_p_R=per_row([c.sampling.top_p for c in contexts], torch.float64),
            min_p_R=per_row([c.sampling.min_p for c in contexts], torch.float64),
            uniform_R=uniform(seed_R, position_R, step_R),
        )
        logits_RV = penalise(logits_RV, self._penalties(items, sizes))
        logits_RV = self._less_repetitive(items, sizes, logits_RV)
        needs = frozenset[str]().union(*(_algorithm(item).needs for item in items))
        measures = Measures("entropy_R" in needs, "margin_R" in needs)
        bans = self._bans(items, sizes, device)
        sampled = sample(logits_RV, rows, bans, measures, wanted(contexts, sizes, device))
        return guided.propose(sampled, logits_RV, rows, bans) if guided else sampled

    def _penalties(self, items: Sequence[WorkItem], sizes: Sequence[int]) -> list[PenaltyRows]:
        requests: list[PenaltyRows] = []
        start = 0
        for item, size in zip(items, sizes, strict=True):
            context = _context(item)
            if has_penalties(context.sampling):
                new = item.tokens[item.known :]
                new = new[new != self.mask_token_id]
                output = np.concatenate([context.output, new]).tolist()
                requests.append(
                    PenaltyRows(range(start, start + size), context.prompt.tolist(), output, context.sampling)
                )
            start += size
        return requests

    def _less_repetitive(self, items: Sequence[WorkItem], sizes: Sequence[int], logits_RV: Tensor) -> Tensor:
        """The logits with each row's `neighbour_penalty` taken off the token on its left, where there is one."""
        triples: list[tuple[int, int, float]] = []
        start = 0
        for item, size in zip(items, sizes, strict=True):
            penalty = 0.0 if item.decoding is None else item.decoding.neighbour_penalty
            if penalty and _algorithm(item).edits and not item.mode.stores:  # they ask for the next block's first one
                left = [(start + i, int(item.tokens[o - 1])) for i, o in enumerate(asked(item)) if o > 0]
                triples.extend((row, token, penalty) for row, token in left if token != self.mask_token_id)
            start += size
        if not triples:
            return logits_RV
        rows, ids, penalties = zip(*triples, strict=True)
        at = tuple(torch.tensor(column, device=logits_RV.device) for column in (rows, ids))
        return logits_RV.index_put(at, -torch.tensor(penalties, device=logits_RV.device).to(logits_RV), accumulate=True)

    def _bans(self, items: Sequence[WorkItem], sizes: Sequence[int], device: torch.device) -> Bans:
        spans: dict[tuple[int, ...], list[NDArray[np.int64]]] = {}  # ids -> rows that must not take them
        start = 0
        for item, size in zip(items, sizes, strict=True):
            context = _context(item)
            if context.ban_always:
                spans.setdefault(context.ban_always, []).append(np.arange(start, start + size))
            if context.ban_early:
                early = int(np.searchsorted(asked(item), context.early_before - item.start))
                spans.setdefault(context.ban_early, []).append(np.arange(start, start + early))
            start += size
        if not spans:
            return Bans(self.mask_token_id, self.vocab_size)
        rows = {ids: np.concatenate(parts) for ids, parts in spans.items()}
        row_N = np.concatenate([np.repeat(mine, len(ids)) for ids, mine in rows.items()])
        id_N = np.concatenate([np.tile(ids, mine.size) for ids, mine in rows.items()])
        return Bans(self.mask_token_id, self.vocab_size, *vectors_to_device([row_N, id_N], device))

    def _current(self, item: WorkItem) -> Ids:
        """What stands at an item's candidates; with shifted logits one may lie behind its rows, still a mask."""
        offsets = asked(item)
        return np.full(offsets.size, self.mask_token_id) if item.mode.stores else item.tokens[offsets]

    def _accept(self, items: Sequence[WorkItem], sizes: Sequence[int], sampled: Sampled) -> Verdict:
        """What the algorithms say of the rows in open sub-blocks; no other is accepted."""
        if all(item.window is None for item in items):
            return self._judge(items, sizes, sampled, np.ones(sum(sizes), dtype=bool))
        open_R = np.concatenate([unmaskable(item) for item in items])
        if open_R.all():
            return self._judge(items, sizes, sampled, open_R)
        few = torch.from_numpy(np.flatnonzero(open_R)).to(sampled.token_R.device)
        entropy_R, margin_R = (None if x is None else x[few] for x in (sampled.entropy_R, sampled.margin_R))
        own = (sampled.token_R[few], sampled.confidence_R[few], sampled.logprob_R[few])
        some = Sampled(*own, entropy_R=entropy_R, margin_R=margin_R)
        verdict = self._judge(items, [int(unmaskable(item).sum()) for item in items], some, open_R)
        accepted_R = torch.zeros_like(sampled.token_R, dtype=torch.bool).index_put((few,), verdict.accepted_R)
        return verdict._replace(accepted_R=accepted_R)

    def _judge(
        self, items: Sequence[WorkItem], sizes: Sequence[int], sampled: Sampled, open_R: NDArray[np.bool_]
    ) -> Verdict:
        """The same of rows that all are in open sub-blocks, `sizes` of each segment. open_R: which of all these are."""
        device = sampled.token_R.device
        decoding = [item.decoding for item in items]
        offsets = np.concatenate([asked(item) for item in items])[open_R]
        current = np.concatenate([self._current(item) for item in items])[open_R]
        taken, planned, lengths = zip(*(plan(item, self.block_length) for item in items), strict=True)
        posts = [item.post_steps for item in items], [d.post_edit_steps for d in decoding if d is not None]
        ends = np.cumsum([0, *sizes])
        about = vectors_to_device([offsets, current, ends, taken, planned, lengths, *posts], device)
        offset_R, current_R, indptr_S, step_index_S, num_steps_S, length_S, post_steps_S, post_edit_steps_S = about
        candidates = Candidates(
            token_R=sampled.token_R,
            confidence_R=sampled.confidence_R,
            offset_R=offset_R,
            indptr_S=indptr_S,
            step_index_S=step_index_S,
            num_steps_S=num_steps_S,
            length_S=length_S,
            threshold_S=to_device([d.threshold for d in decoding if d is not None], torch.float32, device),
            entropy_bound_S=to_device([d.entropy_bound for d in decoding if d is not None], torch.float64, device),
            current_R=current_R,
            masked_R=current_R == self.mask_token_id,
            edit_threshold_S=to_device([d.edit_threshold for d in decoding if d is not None], torch.float32, device),
            post_edit_steps_S=post_edit_steps_S,
            post_steps_S=post_steps_S,
            block_length=self.block_length,
            entropy_R=sampled.entropy_R,
            margin_R=sampled.margin_R,
            order_R=_order(items, sizes, offset_R),
        )
        return accept([_algorithm(item) for item in items], candidates)


def _order(items: Sequence[WorkItem], sizes: Sequence[int], offset_R: Tensor) -> Tensor | None:
    """A number per row by lot, where an algorithm goes by it."""
    if not any("order_R" in _algorithm(item).needs for item in items):
        return None
    about = [[_context(item).seed for item in items], [item.start for item in items], [item.step for item in items]]
    seed_R, start_R, step_R = (to_device(np.repeat(column, sizes), torch.int64, offset_R.device) for column in about)
    return uniform(seed_R ^ ORDER_STREAM, start_R + offset_R, step_R)


def _context(item: WorkItem) -> RowContext:
    assert item.context is not None, "a block segment without its row context"
    return item.context


def _algorithm(item: WorkItem) -> DecodingAlgorithm:
    assert item.decoding is not None, "a denoising segment without decoding parameters"
    return load_algorithm(item.decoding.algorithm)


def _chosen(others: Sequence[Alternatives | None], yes: np.ndarray) -> tuple[Alternatives, ...] | None:
    """Those of the accepted rows of one segment; None where its request wants none."""
    chosen = [other for other, accepted in zip(others, yes, strict=True) if accepted]
    return tuple(other for other in chosen if other is not None) or None

"""Which requests run, and on which pages. Knows no attention, no model, no tensors.

A round: admit what fits, make room for the blocks that are to be stored (evict, then retract the youngest), then one
work item per segment. Rows join and leave per step; nobody waits for the slowest block. Each request ends with exactly
one output that carries a `finish`. A round changes no request before its results are accepted, so one that raised can
be undone: its requests then run alone, one after the other, until it is clear whose fault it was (`trial`).

Results are taken in twice: `accept` does what the next round depends on, `settle` makes texts and messages of it, which
may wait until the next forward runs. A request may end, or be ended, while its forward runs: the results are dropped.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from losa_runtime.cache.prefix_cache import PrefixCache
from losa_runtime.cache.radix import TokenIds
from losa_runtime.core.batch import ForwardMode
from losa_runtime.core.errors import InvalidRequest, QueueFull
from losa_runtime.core.request import FinishReason, RequestOutput
from losa_runtime.core.work import BlockResult, Round, WorkItem
from losa_runtime.scheduler.block import DiffusionBlock, FirstToken
from losa_runtime.scheduler.outbox import Outbox
from losa_runtime.scheduler.policy import Policy, in_order
from losa_runtime.scheduler.progress import Step, error, judge
from losa_runtime.scheduler.req import Req
from losa_runtime.scheduler.scoring import positions_of_round
from losa_runtime.scheduler.trial import Trial
from losa_runtime.scheduler.work_items import WorkItems

logger = logging.getLogger(__name__)

LOOKAHEAD = 32  # waiting requests considered per round, so that a long queue costs the same as a short one


class SchedulerLimits(NamedTuple):
    """block_length, mask_token_id: of the model. max_running, max_queued: requests. prefill_budget: tokens of prompt
    (and rows of scoring) per round. fuse_commit: a commit shares its forward with the next block's first step. policy:
    see `in_order`. shifted_logits: of the model; a block's first token comes with the commit (or prefill) of the block
    before it, so commits are not fused, and a prompt of whole blocks computes its last one even if the cache has it.
    """

    block_length: int
    mask_token_id: int
    max_running: int
    max_queued: int
    prefill_budget: int
    fuse_commit: bool
    policy: Policy = "fcfs"
    shifted_logits: bool = False


class Scheduler:
    """Owns the queue, the running requests, the state slots and, through PrefixCache, the pages."""

    def __init__(self, cache: PrefixCache, limits: SchedulerLimits) -> None:
        assert not (limits.fuse_commit and limits.shifted_logits)
        self.cache, self.limits = cache, limits
        self.waiting: deque[Req] = deque()
        self.running: list[Req] = []
        self._live: dict[str, Req] = {}
        self._slots = list(range(limits.max_running - 1, -1, -1))
        self._released: list[int] = []  # slots whose method state is still to be forgotten
        self._told = 0  # of those, in the current round
        self._in_round: list[tuple[Req, WorkItem]] = []
        self._items = WorkItems(limits.block_length, limits.mask_token_id, cache.page_size, limits.shifted_logits)
        self._outbox = Outbox()
        self._trial = Trial()
        self.prompt_tokens = self.hit_tokens = self.retractions = 0
        self.dropped = 0  # results of requests that had ended

    # -- arrivals and departures ------------------------------------------------------------------------------------

    def add(self, req: Req) -> None:
        """Queue a request. Raises InvalidRequest if it can never fit, QueueFull if the queue is at its limit."""
        if req.request.priority and self.limits.policy != "priority":
            raise InvalidRequest("priority", req.request.priority, "0 or null (the schedule policy is not `priority`)")
        if self._pages(req.peak) > self.cache.pool.num_pages:
            raise InvalidRequest(
                "prompt + max_new_tokens",
                f"{req.settings.limit} tokens",
                f"what needs at most the {self.cache.pool.num_pages * self.cache.page_size} tokens of the page pool",
            )
        if len(self.waiting) >= self.limits.max_queued:
            raise QueueFull(f"{len(self.waiting)} requests are waiting, the limit; try again later")
        self.waiting.append(req)
        self._live[req.request.rid] = req

    def is_live(self, rid: str) -> bool:
        """True while a request of that name is queued or running."""
        return rid in self._live

    def abort(self, rid: str) -> bool:
        """End a live request; its last output comes from the next `settle`. False if there is none of that name."""
        req = self._live.get(rid)
        if req is None:
            return False
        self._end(req, FinishReason(type="abort", message="aborted by the client"))
        return True

    @property
    def has_work(self) -> bool:
        """True while requests are live or an ending has not been reported yet."""
        return bool(self.waiting or self.running or self._outbox)

    # -- one round --------------------------------------------------------------------------------------------------

    def schedule(self) -> Round:
        """The work of the next forward; empty items if nothing can run."""
        suspect = self._trial.suspect()
        if suspect is None:
            self._make_room_for_commits(self.running)
            self._admit()
            return self._round(self.running)
        self._make_room_for_commits([suspect])
        return self._round([suspect] if suspect.lease is not None else [])

    def _round(self, reqs: Sequence[Req]) -> Round:
        """One work item per segment of these running requests."""
        stores: list[tuple[Req, WorkItem]] = []
        blocks: list[tuple[Req, WorkItem]] = []
        budget = self.limits.prefill_budget
        scored = self._positions_to_score(reqs)
        for req in reqs:
            if req.prefilling:
                continue
            if req.unscored:
                scores = self._items.scores(req, scored[req.request.rid])
                budget -= sum(item.tokens.size for item in scores)
                blocks.extend((req, item) for item in scores)
            elif req.block is not None and req.block.complete:
                stores.append((req, self._items.commit(req, req.block)))
                if self.limits.fuse_commit:
                    req.opening = req.open_block(req.block.start + self.limits.block_length, self.limits.mask_token_id)
                    blocks.append((req, self._items.block(req, req.opening)))
            elif req.settings.limit > req.prompt_len:
                if req.block is None:
                    req.block = req.open_block(req.committed, self.limits.mask_token_id)
                blocks.append((req, self._items.block(req, req.block)))
        # At least a block: with a budget of one block, scoring's half is rounded up to all of it.
        budget = max(budget, self.limits.block_length)
        for req in reqs:
            for item in self._items.prefill(req, budget) if req.prefilling else []:
                budget -= item.tokens.size
                stores.append((req, item))
        self._in_round, self._told = stores + blocks, len(self._released)
        return Round(tuple(item for _, item in self._in_round), tuple(self._released))

    def _positions_to_score(self, reqs: Sequence[Req]) -> dict[str, int]:
        """How many, by request; those that are still prefilled have none."""
        scoring = [req for req in reqs if req.unscored and not req.prefilling]
        counts = positions_of_round(
            [len(req.unscored) for req in scoring],
            [req.unscored.start for req in scoring],
            self.limits.prefill_budget,
            self.limits.block_length,
            alone=len(scoring) == len(reqs),
        )
        return {req.request.rid: count for req, count in zip(scoring, counts, strict=True)}

    def commit(self, results: list[BlockResult]) -> list[RequestOutput]:
        """Take in the results of the round, one per segment in order, and report what is new."""
        self.accept(results)
        return self.settle()

    def accept(self, results: list[BlockResult]) -> None:
        """The first half of `commit`: all that the next round depends on."""
        in_round, self._in_round = self._in_round, []
        del self._released[: self._told]
        self._told = 0
        for req in {id(req): req for req, _ in in_round}.values():
            req.cost.forwards += 1
        for (req, item), result in zip(in_round, results, strict=True):
            if req.lease is None:
                self.dropped += 1
                continue
            (self._store if item.mode.stores else self._apply)(req, item, result)
        for req in [r for r in self.running if r.first is not None and r.block is None and not r.unscored]:
            self._begin(req)
        for req in [r for r in self.running if self._has_nothing_to_generate(r)]:
            self._end(req, FinishReason(type="length", length=0))

    def settle(self) -> list[RequestOutput]:
        """The second half of `commit`, to be called before the next `accept`: what is new, and who ends with it."""
        outputs, found = self._outbox.settle()
        for req in found:
            self._drop(req)
        return outputs

    def undo(self) -> tuple[str, ...]:
        """The round has raised and has no results: nothing of it counts. The ids of its requests.

        They are tried one by one in the next rounds; the one that was being tried is guilty and ends with an error.
        Method state may be half written, so unfinished blocks start again.
        """
        in_round, self._in_round, self._told = self._in_round, [], 0
        reqs = [req for req in {id(req): req for req, _ in in_round}.values() if req.lease is not None]
        if reqs == [self._trial.suspect()]:
            self._end(reqs[0], error("the engine failed on this request; the server's log says why"))
        else:
            self._trial.open(reqs)
            for req in reqs:
                req.reopen()
                self._released.append(req.slot)
        return tuple(req.request.rid for req in reqs)

    def released(self) -> tuple[int, ...]:
        """Slots given back since the last round: whoever asks forgets their method state, no round will name them."""
        slots, self._released = tuple(self._released), []
        return slots

    # -- results ----------------------------------------------------------------------------------------------------

    def _apply(self, req: Req, item: WorkItem, result: BlockResult) -> None:
        """Take in what a block segment has brought. What raises here is this request's alone."""
        if result.error is not None:
            self._unusable(req, result)
            return
        try:
            step = self._progress(req, item, result)
        except Exception:
            logger.exception("the results of request %s could not be taken in", req.request.rid)
            self._end(req, error("the engine failed on this request's results; the server's log says why"))
            return
        if step is not None and (step.end is not None or req.request.trace):
            self._report(req, step)

    def _begin(self, req: Req) -> None:
        """Open the block whose first token is there; with it, the request may be at its end."""
        req.block = req.open_block(req.committed, self.limits.mask_token_id)
        step = self._judge(req, req.block)
        if step.end is not None:
            self._report(req, step)

    def _report(self, req: Req, step: Step) -> None:
        self._outbox.put(req, step)
        if step.last:
            self._leave(req)

    def _progress(self, req: Req, item: WorkItem, result: BlockResult) -> Step | None:
        block = req.block
        if item.mode is ForwardMode.SCORE:
            req.scores.append(float(result.logprobs[0]))
            req.score_alternatives.extend(result.alternatives or ())
            return None
        assert block is not None and result.cost is not None
        req.cost.add_step(result.cost, first=item.mode is ForwardMode.OPEN, unmasked=block.latest)
        block.accept(result.offsets, result.tokens, result.logprobs, result.finished)
        if result.alternatives is not None:
            block.alternatives.update(zip(block.latest, result.alternatives, strict=True))
        return self._judge(req, block)

    def _judge(self, req: Req, block: DiffusionBlock) -> Step:
        """What the block is now, and its tokens for good if it is finished."""
        step = judge(req, block)
        req.cost.blocks += step.end is not None
        if step.end is not None and not step.last:
            req.tokens[block.start : block.start + block.tokens.size] = block.tokens
            req.length = block.start + block.tokens.size
        return step

    def _store(self, req: Req, item: WorkItem, result: BlockResult) -> None:
        """The K/V of a store segment are in their pages: share them."""
        if result.error is not None:
            self._unusable(req, result)
            return
        assert req.lease is not None
        req.committed = item.start + item.tokens.size
        self.cache.publish(req.lease, req.tokens[: req.committed])
        if item.mode is ForwardMode.COMMIT:
            req.block, req.opening = req.opening, None
        if result.tokens.size:
            others = None if result.alternatives is None else result.alternatives[0]
            req.first = FirstToken(int(result.tokens[0]), float(result.logprobs[0]), others)

    def _unusable(self, req: Req, result: BlockResult) -> None:
        """Numbers that are none: the request ends, and nobody will find what it has stored since it came. The K/V of
        this round were never shared; earlier ones looked sound, but the same run of the model has made them. Where the
        request itself is refused, it ends, and no more."""
        assert req.lease is not None and result.error is not None
        if result.refused:
            self._end(req, error(result.error, 400))
            return
        if result.cost is not None and req.block is not None:
            req.cost.add_step(result.cost, first=req.block.step == 0, unmasked=req.block.latest)
        self.cache.condemn(req.lease, req.trusted)
        self._end(req, error(result.error))

    def _has_nothing_to_generate(self, req: Req) -> bool:
        return req.settings.limit <= req.prompt_len and not req.prefilling and not req.unscored

    # -- memory -----------------------------------------------------------------------------------------------------

    def _make_room_for_commits(self, reqs: Sequence[Req]) -> None:
        """Pages for every block of these that is about to be stored; `_dispensable` says who comes first and who of
        all gives way."""
        for req in sorted(reqs, key=self._dispensable):
            if req.lease is None or req.block is None or not req.block.complete:
                continue
            while not self.cache.grow(req.lease, req.committed + self.limits.block_length):
                victim = max(self.running, key=self._dispensable)
                self._retract(victim)
                if victim is req:
                    break

    def _dispensable(self, req: Req) -> tuple[int, int]:
        """Who gives way first: the lowest priority where that is the policy, then the youngest."""
        return (-req.request.priority if self.limits.policy == "priority" else 0), req.order

    def _retract(self, req: Req) -> None:
        """Give a running request's pages back and queue it again, first in line."""
        self._give_back(req)
        self.retractions += 1
        req.rewind()
        self.waiting.appendleft(req)

    def _admit(self) -> None:
        """Let waiting requests in, in the policy's order, while there are slots and pages; those that will share a
        prefix which is being prefilled right now wait for it."""
        if not self.waiting or not self._slots:
            return
        for req in in_order(self.limits.policy, self.waiting, self.cache)[:LOOKAHEAD]:
            reusable = self._reusable(req)
            if self._prefix_in_flight(req, reusable.size, self.cache.peek(req.request.namespace, reusable)):
                continue
            if not self._try_admit(req, reusable):
                break
            self.waiting.remove(req)
            self.running.append(req)
            if not self._slots:
                break

    def _reusable(self, req: Req) -> TokenIds:
        """The known tokens that may come from the cache: all, but the last block where its logits are needed."""
        needed = self.limits.shifted_logits and req.prefill_target == req.length < req.settings.limit
        return req.tokens[: req.prefill_target - (self.limits.block_length if needed else 0)]

    def _try_admit(self, req: Req, reusable: TokenIds) -> bool:
        """Give a request its lease and slot; False (and nothing changed) if its known tokens do not fit now.

        A block's worth of pages stays in reserve for each running request, so that a newcomer does not at once push
        another one out.
        """
        lease = self.cache.open(req.request.namespace, reusable, self._pages(req.tokens.size))
        hit = lease.count * self.cache.page_size
        reserve = self._pages(self.limits.block_length) * len(self.running)
        need = self._pages(req.prefill_target) - lease.count
        crowded = self.running and need + reserve > self.cache.available
        if crowded or not self.cache.grow(lease, req.prefill_target):
            self.cache.close(lease)
            return False
        self.cache.count_hit(lease)
        req.lease, req.committed, req.slot = lease, hit, self._slots.pop()
        req.trusted = min(req.trusted, hit)
        if req.cached_tokens is None:
            req.cached_tokens = hit
            req.cost.queued_s = time.monotonic() - req.arrived
            self.prompt_tokens += req.prompt_len
            self.hit_tokens += hit
        return True

    def _prefix_in_flight(self, req: Req, end: int, hit: int) -> bool:
        """True if a running prefill will soon provide more of the prefix up to `end` than the cache has now."""
        if not self.cache.reuse:
            return False
        for other in self.running:
            if not other.prefilling or other.request.namespace != req.request.namespace:
                continue
            size = min(end, other.prefill_target)
            first = slice(hit, hit + self.cache.unit)
            if (
                size - hit >= self.cache.unit
                and np.array_equal(req.tokens[first], other.tokens[first])
                and np.array_equal(req.tokens[:hit], other.tokens[:hit])
            ):
                return True
        return False

    # -- endings ----------------------------------------------------------------------------------------------------

    def _end(self, req: Req, finish: FinishReason) -> None:
        self._outbox.put(req, finish)
        self._drop(req)

    def _drop(self, req: Req) -> None:
        """Let a request go, if it is still here."""
        if self._live.get(req.request.rid) is not req:
            return
        if req.lease is None:
            self.waiting.remove(req)
            del self._live[req.request.rid]
        else:
            self._leave(req)

    def _leave(self, req: Req) -> None:
        self._give_back(req)
        req.lease, req.slot = None, -1
        del self._live[req.request.rid]

    def _give_back(self, req: Req) -> None:
        assert req.lease is not None
        self.cache.close(req.lease)
        self.running.remove(req)
        self._slots.append(req.slot)
        self._released.append(req.slot)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.cache.page_size)

"""A forward without a model: tokens are a function of position. And a text that is one letter per token."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel

from losa_runtime.cache.prefix_cache import PrefixCache
from losa_runtime.core.batch import ActiveRule, ForwardMode, SparseParams
from losa_runtime.core.decoding_params import DecodingParams
from losa_runtime.core.request import Request, RequestOutput, ScoreSpec
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.core.work import BlockResult, Round, SegmentCost, WorkItem, nothing
from losa_runtime.scheduler.policy import Policy
from losa_runtime.scheduler.req import Req, ReqSettings
from losa_runtime.scheduler.scheduler import Scheduler, SchedulerLimits
from losa_runtime.text_stream import TextStream

MASK = 999


class NoOptions(BaseModel):
    """Options of no method."""


NO_COST = SegmentCost(0.0, 0.0, (0.0,) * 1024, dense=True, kv_bytes=0, metadata_bytes=0, dense_bytes=0)


class IdText:
    """A detokenizer whose text is one letter per token."""

    def push(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)

    def flush(self) -> str:
        return ""


class World:
    """A scheduler with a stub in place of the runner. `content` maps each page to the tokens whose K/V it holds."""

    def __init__(
        self,
        pages: int,
        block: int = 4,
        page: int = 4,
        running: int = 4,
        budget: int = 16,
        fuse: bool = True,
        queue: int = 64,
        reuse: bool = True,
        policy: Policy = "fcfs",
        overlap: bool = False,
        sudden: bool = False,
        shifted: bool = False,
    ) -> None:
        self.block, self.page, self.overlap = block, page, overlap
        self.sudden = sudden  # a forward that raises does so when it is launched, not when it is waited for
        self.flight: tuple[list[BlockResult], bool] | None = None  # results of the forward in flight; whether it raises
        self.cache = PrefixCache(pages, page, block, reuse=reuse)
        limits = SchedulerLimits(block, MASK, running, queue, budget, fuse and not shifted, policy, shifted)
        self.shifted = shifted
        self.scheduler = Scheduler(self.cache, limits)
        self.content: dict[int, tuple[int, ...]] = {}
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.arrivals = 0
        self.rounds: list[Round] = []
        self.failing: set[int] = set()  # positions at which the stub has no usable result
        self.breaking: set[int] = set()  # positions whose K/V are no numbers
        self.guilty: set[str] = set()  # requests with which a forward raises
        self.raising = 0  # so many of the next forwards raise, whoever is in them
        self.undone: list[tuple[str, ...]] = []  # who was in the forwards that raised

    def add(
        self,
        rid: str,
        prompt: list[int],
        new: int,
        stop: tuple[int, ...] = (),
        score: int | None = None,
        namespace: str = "",
        priority: int = 0,
        stop_text: str | None = None,
    ) -> None:
        request = Request(
            rid=rid,
            prompt_ids=tuple(prompt),
            sampling=SamplingParams(max_new_tokens=new),
            score=None if score is None else ScoreSpec(start=score),
            namespace=namespace,
            priority=priority,
        )
        settings = ReqSettings(
            seed=0,
            limit=len(prompt) + new,
            stop_ids=frozenset(stop),
            ban_always=(),
            ban_early=(),
            sparse=SparseParams("dense", 16, ActiveRule("count", 1), NoOptions(), 16),
            decoding=DecodingParams("sequential", 0.9, self.block),
            text=TextStream(IdText(), () if stop_text is None else (stop_text,), False),
        )
        self.scheduler.add(Req(request, settings, self.arrivals, self.block))
        self.outputs[rid] = []
        self.arrivals += 1

    def step(self) -> Round:
        """As the engine does it; with `overlap` the forward of the returned round is still in flight."""
        if self.overlap:
            self.accept()
            work = self.launch()
        else:
            work = self.launch()
            self.accept()
        for output in self.scheduler.settle():
            self.outputs[output.rid].append(output)
        self.cache.check()
        return work

    def launch(self) -> Round:
        work = self.scheduler.schedule()
        self.rounds.append(work)
        self.ran = [req.request.rid for req, _ in self.scheduler._in_round]
        raises = bool(work.items) and (self.raising > 0 or not self.guilty.isdisjoint(self.ran))
        for item in work.items[: len(work.items) // 2 if raises else None]:
            self.read_and_write(item)
        if raises and self.sudden:
            self.undo()
        elif work.items:
            self.flight = ([] if raises else [self.result(item) for item in work.items]), raises
        else:
            self.scheduler.accept([])
        return work

    def accept(self) -> None:
        if self.flight is None:
            return
        (results, raises), self.flight = self.flight, None
        if raises:
            self.undo()
        else:
            self.scheduler.accept(results)

    def undo(self) -> None:
        self.raising -= self.raising > 0
        live = {rid for rid in self.ran if self.scheduler.is_live(rid)}
        assert self.overlap or live == set(self.ran)
        self.undone.append(self.scheduler.undo())
        assert set(self.undone[-1]) == live

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.flight is not None

    def read_and_write(self, item: WorkItem) -> None:
        """Every page read must hold exactly this request's prefix; store segments write theirs."""
        end = item.start + item.tokens.size if item.mode.stores else item.start
        sequence: tuple[int, ...] = ()
        for index in range(-(-item.start // self.page)):
            stop = min(self.page, item.start - index * self.page)
            sequence += self.content[int(item.pages[index])][:stop]
        assert len(sequence) == item.start
        if item.mode.stores:
            assert MASK not in item.tokens, "a mask was stored"
            sequence += tuple(int(t) for t in item.tokens)
            for index in range(item.start // self.page, -(-end // self.page)):
                self.content[int(item.pages[index])] = sequence[index * self.page : (index + 1) * self.page]
        self.last_prefix = sequence

    def result(self, item: WorkItem) -> BlockResult:
        if item.mode.stores:
            positions = np.arange(item.start, item.start + item.tokens.size)
            if item.candidates is None or self.breaking & set(positions.tolist()):
                return nothing("broken" if self.breaking & set(positions.tolist()) else None)
            assert self.shifted and item.candidates.tolist() == [item.tokens.size] == [item.known]
            behind = item.candidates + item.start
            return BlockResult(np.zeros(1, dtype=np.int64), behind * 7 % 50, np.array([-0.25]))
        assert item.candidates is not None
        assert not self.shifted or item.candidates.min(initial=1) > 0, "no row speaks for a block's first position"
        positions = item.candidates + item.start
        if self.failing & set(positions.tolist()):
            return BlockResult(item.candidates[:0], item.candidates[:0], np.empty(0), error="unusable")
        if item.mode is ForwardMode.SCORE:
            return BlockResult(item.candidates, np.array([item.target]), -1.0 - positions.astype(float))
        take = max(1, item.candidates.size // 2)
        chosen = item.candidates[::-1][:take] if item.step % 2 else item.candidates[:take]
        chosen = np.sort(chosen)
        return BlockResult(chosen, (chosen + item.start) * 7 % 50, -0.5 * np.ones(chosen.size), NO_COST)

    def drain(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.has_work:
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")

    def tokens(self, rid: str) -> list[int]:
        return [t for output in self.outputs[rid] for t in output.token_ids]

    def text(self, rid: str) -> str:
        return "".join(output.text for output in self.outputs[rid])

    def terminal(self, rid: str) -> list[RequestOutput]:
        return [o for o in self.outputs[rid] if o.finish is not None]

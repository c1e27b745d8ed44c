"""How long blocks take on this machine, densely and with each method: a short measurement before the first request.

One made-up request whose prefix is noise, on pages that are nobody's yet, through the runner as it will run: layers,
attention, logits, sampling. Noise agrees less than text on what to read, so the lists are long and sparse methods look
rather slower than they are. Times are the least of a few, on a CPU the processor's seconds: neighbours on the machine
can only add to them.
Knows no request and no scheduler.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import torch

from losa_runtime.core.batch import ActiveRule, ForwardMode, SparseParams
from losa_runtime.core.decoding_params import DecodingParams
from losa_runtime.core.errors import ConfigError
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.core.work import Round, RowContext, WorkItem
from losa_runtime.runner.model_runner import ModelRunner
from losa_runtime.sparse.method import method_class
from losa_runtime.sparse.min_context import Line, MethodCosts, MinContext
from losa_runtime.sparse.step import most_active

logger = logging.getLogger(__name__)

LONGEST = 8192  # tokens of prefix: enough to tell costs per token from fixed ones, and soon filled
LEAST_PAGES = 16
STEPS = 4  # of a measured block
PLAYS = 4  # of each block, after one that warms up
CHUNK = 2048  # tokens of noise stored at once
NOBODY = np.empty(0, dtype=np.int32)


class _Times(NamedTuple):
    """Seconds: of the first step, and of a later one, on average."""

    first: float
    later: float


_Case = tuple[str, SparseParams, int]  # method, parameters, tokens of prefix


def measure_costs(runner: ModelRunner, defaults: Mapping[str, SparseParams], context_length: int) -> MinContext:
    """The rule by what every method costs with its parameters of `defaults`, which name "dense" too.

    To be called before the pool holds anything; takes under a hundred forwards per method. Raises ConfigError if the
    pool is too small.
    """
    stage = _Stage(runner, context_length)
    trials = {name: _Trial.of(stage, params) for name, params in defaults.items()}
    blocks = dict.fromkeys((name, *block) for name, trial in trials.items() for block in trial.blocks(stage))
    times = stage.play(blocks)
    stage.leave()
    dense = trials.pop("dense")
    every = [min(times["dense", dense.params, n]) for n in (stage.short, stage.long)]  # all its steps are alike
    line = Line.through((stage.short, every[0]), (stage.long, every[1]))
    return MinContext(
        None, stage.block, line, {name: trial.costs(stage, name, times) for name, trial in trials.items()}
    )


class _Trial(NamedTuple):
    """The blocks of one method that are compared: at two lengths of prefix, for methods with a budget with two budgets
    that both leave something to choose, and for those with active rows with two numbers of them."""

    params: SparseParams
    cheap: SparseParams | None = None
    other: SparseParams | None = None

    @classmethod
    def of(cls, stage: _Stage, params: SparseParams) -> _Trial:
        method = method_class(params.method)
        if not method.has_budget:
            return cls(params)
        much = min(params.token_budget, stage.short // 2 // stage.page * stage.page)
        little = max(stage.page, much // 4 // stage.page * stage.page)
        params = params._replace(token_budget=much)
        if not method.has_active_rows:
            return cls(params, params._replace(token_budget=little))
        rows = most_active(params.active, stage.block)  # noise would not say how many rows a share of the change is
        params = params._replace(active=ActiveRule("count", rows))
        others = 1 if rows > stage.block // 2 else stage.block
        return cls(
            params,
            params._replace(token_budget=little),
            params._replace(active=ActiveRule("count", others)) if others != rows else None,
        )

    def blocks(self, stage: _Stage) -> list[tuple[SparseParams, int]]:
        """Parameters and prefix of each."""
        more = [(params, stage.long) for params in (self.cheap, self.other) if params is not None]
        return [(self.params, stage.short), (self.params, stage.long), *more]

    def costs(self, stage: _Stage, name: str, times: Mapping[_Case, _Times]) -> MethodCosts:
        short, long = (times[name, self.params, n] for n in (stage.short, stage.long))
        first = Line.through((stage.short, short.first), (stage.long, long.first))
        later = Line.through((stage.short, short.later), (stage.long, long.later))
        found = MethodCosts(first, later)
        if self.cheap is not None:
            budget, less = self.params.token_budget, self.params.token_budget - self.cheap.token_budget
            saved = long.later - times[name, self.cheap, stage.long].later
            found = found._replace(budget=budget, per_token=max(0.0, saved / less) if less else 0.0)
        if self.other is not None:
            rows, others = int(self.params.active.value), int(self.other.active.value)
            more = times[name, self.other, stage.long].later - long.later
            found = found._replace(rows=rows, per_row=max(0.0, more / (others - rows)))
        return found


class _Stage:
    """The made-up request in the pool's first pages. short, long: the two lengths of its prefix."""

    def __init__(self, runner: ModelRunner, context_length: int) -> None:
        pool, config = runner.backend.pool, runner.model.config
        self.runner, self.page, self.block = runner, pool.page_size, config.block_length
        self.mask = config.mask_token_id
        # What runs beside this takes cores for a while, so the clock says little; their seconds are all threads' work.
        self.clock = time.process_time if pool.device.type == "cpu" else time.perf_counter
        unit = max(self.page, self.block)
        room = min(pool.num_pages * self.page, context_length - self.block, LONGEST)
        self.long = room // unit * unit
        self.short = self.long // 4 // unit * unit
        if self.long < LEAST_PAGES * unit:
            raise ConfigError(
                f"sparse_min_context: found 'auto', allowed: a number, as there are only {max(0, room)} tokens of "
                f"pages and context to measure with (at least {LEAST_PAGES * unit})"
            )
        self.pages = np.arange(self.long // self.page, dtype=np.int64)
        self._fill()

    def play(self, blocks: Collection[_Case]) -> dict[_Case, _Times]:
        """The least times of the steps of each, by method, parameters and prefix; all in turn, so that a slow while of
        the machine meets all alike."""
        found: dict[_Case, _Times] = {}
        for number in range(PLAYS + 1):
            for case in blocks:
                _, params, prefix = case
                first, later = self._block(params._replace(planned_steps=STEPS), prefix)
                if number > 1:
                    first, later = min(first, found[case].first), min(later, found[case].later)
                found[case] = _Times(first, later)
        return found

    def leave(self) -> None:
        """Forget the methods' state."""
        self.runner.run(Round((), (0,)))

    def _block(self, params: SparseParams, prefix: int) -> _Times:
        tokens = np.full(self.block, self.mask, dtype=np.int64)
        seconds = []
        for step in range(min(STEPS, self.block)):
            work = Round((self._item(params, prefix, tokens, step),), (0,) if step == 0 else ())
            began = self.clock()
            [result] = self.runner.run(work)
            seconds.append(self.clock() - began)
            tokens[result.offsets] = result.tokens
        later = seconds[1:] or seconds
        return _Times(seconds[0], sum(later) / len(later))

    def _item(self, params: SparseParams, prefix: int, tokens: np.ndarray, step: int) -> WorkItem:
        left = np.flatnonzero(tokens == self.mask)
        return WorkItem(
            mode=ForwardMode.DENOISE if step else ForwardMode.OPEN,
            tokens=tokens.copy(),
            start=prefix,
            pages=self.pages[: -(-prefix // self.page)],
            slot=0,
            step=step,
            candidates=left,
            sparse=params,
            decoding=DecodingParams("low_confidence_static", 1.0, min(STEPS, self.block)),
            context=RowContext(SamplingParams(temperature=0.0), 0, (), (), 0, NOBODY, NOBODY),
            unmasked=tokens.size - left.size,
        )

    @torch.inference_mode()
    def _fill(self) -> None:
        """Noise as K/V, with the summaries that go with it."""
        backend, pool = self.runner.backend, self.runner.backend.pool
        generator = torch.Generator(pool.device).manual_seed(0)
        dtype = next(self.runner.model.parameters()).dtype
        for start in range(0, self.long, CHUNK):
            stop = min(start + CHUNK, self.long)
            locations = torch.arange(start, stop, device=pool.device)
            shape = (stop - start, pool.num_kv_heads, pool.head_dim)
            for layer in range(pool.num_layers):
                k, v = (torch.randn(shape, generator=generator, device=pool.device).to(dtype) for _ in range(2))
                backend.store_kv(layer, k, v, locations)

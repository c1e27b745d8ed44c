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
from collections.abc import Mapping
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

LONGEST = 4096  # tokens of prefix: enough to tell costs per token from fixed ones, and soon filled
LEAST_PAGES = 16
STEPS = 4  # of a measured block
PLAYS = 3  # of each block, after one that warms up
CHUNK = 2048  # tokens of noise stored at once
NOBODY = np.empty(0, dtype=np.int32)


class _Times(NamedTuple):
    """Seconds: of the first step, and of a later one, on average."""

    first: float
    later: float


def measure_costs(runner: ModelRunner, defaults: Mapping[str, SparseParams], context_length: int) -> MinContext:
    """The rule by what every method costs with its parameters of `defaults`, which name "dense" too.

    To be called before the pool holds anything; takes some dozens of forwards per method. Raises ConfigError if the
    pool is too small.
    """
    stage = _Stage(runner, context_length)
    dense = Line.through(*((n, _every(stage.play(defaults["dense"], n))) for n in (stage.short, stage.long)))
    methods = {}
    for name, params in defaults.items():
        if name != "dense":
            methods[name] = _costs(stage, params)
    stage.leave()
    return MinContext(None, stage.block, dense, methods)


def _every(times: _Times) -> float:
    """A dense step: all are alike."""
    return min(times)


def _costs(stage: _Stage, params: SparseParams) -> MethodCosts:
    """By two lengths of prefix, for methods with a budget by two budgets that both leave something to choose, and for
    those with active rows by two numbers of them."""
    method = method_class(params.method)
    if not method.has_budget:
        short, long = (stage.play(params, n) for n in (stage.short, stage.long))
        return MethodCosts(*_lines(stage, short, long))
    page = stage.page
    much = min(params.token_budget, stage.short // 2 // page * page)
    little = max(page, much // 4 // page * page)
    rows = most_active(params.active, stage.block) if method.has_active_rows else 0
    if rows:  # noise would not say how many rows a share of the change is
        params = params._replace(active=ActiveRule("count", rows))
    short, long = (stage.play(params._replace(token_budget=much), n) for n in (stage.short, stage.long))
    cheap = stage.play(params._replace(token_budget=little), stage.long)
    per_token = max(0.0, (long.later - cheap.later) / (much - little)) if much > little else 0.0
    found = MethodCosts(*_lines(stage, short, long), much, per_token)
    others = 1 if rows > stage.block // 2 else stage.block
    if not rows or others == rows:
        return found
    other = stage.play(params._replace(token_budget=much, active=ActiveRule("count", others)), stage.long)
    return found._replace(rows=rows, per_row=max(0.0, (other.later - long.later) / (others - rows)))


def _lines(stage: _Stage, short: _Times, long: _Times) -> tuple[Line, Line]:
    return (
        Line.through((stage.short, short.first), (stage.long, long.first)),
        Line.through((stage.short, short.later), (stage.long, long.later)),
    )


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
        self.short = self.long // 2 // unit * unit
        if self.long < LEAST_PAGES * unit:
            raise ConfigError(
                f"sparse_min_context: found 'auto', allowed: a number, as there are only {max(0, room)} tokens of "
                f"pages and context to measure with (at least {LEAST_PAGES * unit})"
            )
        self.pages = np.arange(self.long // self.page, dtype=np.int64)
        self._fill()

    def play(self, params: SparseParams, prefix: int) -> _Times:
        """The least times of a block's steps behind so many tokens."""
        plays = [self._block(params._replace(planned_steps=STEPS), prefix) for _ in range(PLAYS + 1)][1:]
        return _Times(min(play.first for play in plays), min(play.later for play in plays))

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

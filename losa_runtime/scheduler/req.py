"""The life of one request inside the engine: its tokens, its block, its lease, its costs. Knows no policy."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from losa_runtime.cache.prefix_cache import Lease
from losa_runtime.core.batch import SparseParams
from losa_runtime.core.decoding_params import DecodingParams
from losa_runtime.core.request import Alternatives, Request
from losa_runtime.core.work import Guide, Ids, RowContext
from losa_runtime.scheduler.block import DiffusionBlock, FirstToken
from losa_runtime.scheduler.costs import CostSum
from losa_runtime.text_stream import TextStream


class Progress(NamedTuple):
    """How far a request has come; grows with every forward that it takes part in, unless its block starts again."""

    committed: int
    scored: int
    length: int
    step: int


class ReqSettings(NamedTuple):
    """What the engine has settled for a request before it is queued.

    limit: end position (exclusive) of prompt + output. stop_ids: tokens that end the output. ban_always: ids that are
    never chosen (EOS under ignore_eos); ban_early: ids not chosen before min_new_tokens. text: its stream of text.
    sparse: what blocks read; behind fewer than `sparse_from` tokens they read `dense` instead. guide: what the output
    must match, if anything. edits: whether the decoding algorithm may replace tokens that it has accepted. scored_from:
    prompt positions before it have no score. origin: where the first whole block begins, below B; what lies before it
    is a block of its own.
    """

    seed: int
    limit: int
    stop_ids: frozenset[int]
    ban_always: tuple[int, ...]
    ban_early: tuple[int, ...]
    sparse: SparseParams
    decoding: DecodingParams
    text: TextStream
    guide: Guide | None = None
    sparse_from: int = 0
    dense: SparseParams | None = None
    edits: bool = False
    scored_from: int = 0
    origin: int = 0

    def reading(self, prefix: int) -> SparseParams:
        """What a block behind so many tokens reads, in all its steps."""
        if prefix >= self.sparse_from:
            return self.sparse
        assert self.dense is not None, "a least prefix without what is read below it"
        return self.dense


class Req:
    """One live request.

    tokens[:length] are the prompt and the output of finished blocks; `committed` of them have K/V in pages of `lease`
    (whole blocks). `block` is the one being denoised, `opening` the next one while it shares the commit's forward,
    `first` (with shifted logits) the token that those committed have brought for the position behind them.
    `slot` indexes method state while the request runs, -1 else. The K/V of the first `trusted` tokens were there before
    this request came; what lies behind, it may have stored itself.
    """

    def __init__(self, request: Request, settings: ReqSettings, order: int, block_length: int) -> None:
        self.request, self.settings, self.order = request, settings, order
        self.arrived = time.monotonic()
        self.block_length = block_length
        prompt = np.asarray(request.prompt_ids, dtype=np.int32)
        self.prompt_len = self.length = int(prompt.size)
        # Room for whole blocks, so that a finished block is appended by one slice assignment.
        self.origin = settings.origin
        blocks = -(-(max(settings.limit, self.prompt_len) - self.origin) // block_length)
        self.tokens: NDArray[np.int32] = np.zeros(self.origin + blocks * block_length, dtype=np.int32)
        self.tokens[: self.length] = prompt
        self.committed = 0
        self.trusted = self.tokens.size
        self.lease: Lease | None = None
        self.slot = -1
        self.block: DiffusionBlock | None = None
        self.opening: DiffusionBlock | None = None
        self.first: FirstToken | None = None
        start = self.prompt_len if request.score is None else request.score.start
        unscored = max(0, min(settings.scored_from, self.prompt_len) - start)
        self.scores: list[float | None] = [None] * unscored
        self.score_alternatives: list[Alternatives | None] = [None] * unscored
        self.completion_tokens = 0
        self.ended = False  # its ending has been told
        self.cached_tokens: int | None = None
        self.cost = CostSum()
        repeats = request.sampling.repetition_penalty != 1.0
        self._distinct_prompt = np.unique(prompt) if repeats else prompt[:0]

    @property
    def prefill_target(self) -> int:
        """Tokens to be stored before denoising: whole blocks of what is known."""
        return self.length - (self.length - self.origin) % self.block_length

    def block_of(self, position: int) -> range:
        """The positions of the block that one lies in."""
        start = position - (position - self.origin) % self.block_length
        return range(start, start + self.block_length) if start >= 0 else range(self.origin)

    @property
    def peak(self) -> int:
        """Most tokens that are ever stored: the last block never is, unless it is part of the prompt."""
        return max(self.prefill_target, self.block_of(max(0, self.settings.limit - 1)).start)

    @property
    def prefilling(self) -> bool:
        """True while known whole blocks lack their K/V. A finished block is stored by its COMMIT, not by prefill."""
        return self.block is None and self.committed < self.prefill_target

    @property
    def wants_alternatives(self) -> bool:
        """Whether other ids are reported beside the tokens."""
        return self.request.top_logprobs > 0 or bool(self.request.logprob_ids)

    @property
    def unscored(self) -> range:
        """Prompt positions whose score is still wanted."""
        score = self.request.score
        if score is None:
            return range(0)
        return range(score.start + len(self.scores), self.prompt_len)

    @property
    def progress(self) -> Progress:
        """See there."""
        unfinished = self.block is not None and not self.block.complete
        return Progress(
            self.committed, len(self.scores), self.length, self.block.step if unfinished and self.block else 0
        )

    def open_block(self, start: int, mask_token_id: int) -> DiffusionBlock:
        """The block at `start`, with the known tokens behind it."""
        known: Ids = self.tokens[start : max(start, self.length)].astype(np.int64)
        limit = min(self.block_length, self.settings.limit - start)
        decoding, edits = self.settings.decoding, self.settings.edits
        about = (self.block_length, mask_token_id, edits, decoding.sub_block_length)
        block = DiffusionBlock(start, known, limit, *about)
        if self.first is not None and start == self.length:
            block.foretell(self.first)
        return block

    def row_context(self) -> RowContext:
        """What sampling needs to know of this request; views, valid during the round."""
        return RowContext(
            sampling=self.request.sampling,
            seed=self.settings.seed,
            ban_always=self.settings.ban_always,
            ban_early=self.settings.ban_early,
            early_before=self.prompt_len + self.request.sampling.min_new_tokens,
            prompt=self._distinct_prompt,
            output=self.tokens[self.prompt_len : self.length],
            top_logprobs=self.request.top_logprobs,
            logprob_ids=self.request.logprob_ids,
            guide=self.settings.guide,
        )

    def reopen(self) -> None:
        """Forget the steps of an unfinished block, whose method state can no longer be trusted: as in `rewind`, it
        comes out the same. A finished block is stored again."""
        if self.block is not None and not self.block.complete:
            self.block = None
        self.opening = None

    def rewind(self) -> None:
        """Forget pages and the block in the making, keep finished tokens: random numbers are a function of (seed,
        position, step), so the block comes out the same when it is opened again."""
        self.committed, self.slot, self.lease = 0, -1, None
        self.block = self.opening = self.first = None
        self.cost.retractions += 1

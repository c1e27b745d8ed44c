"""The heart on one screen: `step` = schedule and launch, wait and accept, settle. Knows no socket and no prompt text.

Loads model, tokenizer, pools and methods once, settles every request's parameters when it arrives, and from then on
only moves rounds between the scheduler and the runner. On a device that computes beside the host one forward is always
in flight between two steps: texts, messages and whatever the caller does with them are made under it. A forward that
raises is undone and tried request by request, so that one request's trouble stays its own; if the engine itself is the
trouble, it says so and is to be replaced.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter

import numpy as np

from losa_runtime.assembly import Parts, assemble
from losa_runtime.core.batch import ForwardMode
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import EngineBroken, InvalidRequest
from losa_runtime.core.request import Request, RequestOutput
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.core.work import Round, RowContext, WorkItem
from losa_runtime.decoding.penalties import check_logit_bias, counts_tokens
from losa_runtime.decoding.registry import load_algorithm
from losa_runtime.decoding.registry import resolve as resolve_decoding
from losa_runtime.grammar.guide import Guides
from losa_runtime.runner.model_runner import Launched
from losa_runtime.runner.token_grammars import TokenGrammars
from losa_runtime.scheduler.costs import ReadSum
from losa_runtime.scheduler.req import Req, ReqSettings
from losa_runtime.scheduler.scheduler import Scheduler, SchedulerLimits
from losa_runtime.sparse.resolve import resolve as resolve_sparse
from losa_runtime.text_stream import TextStream
from losa_runtime.tokenizer import Detokenizer

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 10.0
# So many requests in a row that raise alone, without a forward that succeeds in between, are not to blame themselves.
FAILURES_IN_A_ROW = 8


class Engine:
    """A model, its cache and its queue. One thread; call `step` while `has_work`.

    Raises ConfigError or CheckpointError from the constructor, InvalidRequest or QueueFull from `add`. Every request
    that `add` accepted ends with exactly one RequestOutput that carries a `finish`.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.parts: Parts = assemble(config)
        self.config = config
        self.scheduler = Scheduler(
            self.parts.cache,
            SchedulerLimits(
                block_length=self.parts.model_config.block_length,
                mask_token_id=self.parts.model_config.mask_token_id,
                max_running=config.max_running_requests,
                max_queued=config.max_queued_requests,
                prefill_budget=max(config.chunked_prefill_size, self.parts.model_config.block_length),
                fuse_commit=self.parts.fused_commit,
                policy=config.schedule_policy,
                shifted_logits=self.parts.runner.model.shifted_logits,
            ),
        )
        self._moves = config.block_grid == "prompt-end"  # blocks, with the length of a prompt
        self.overlap = self.parts.overlap
        self._flight: Launched | None = None
        self._arrivals = 0
        self._next_check = 0.0
        self.forwards = self._generated = 0
        self.undone = 0  # forwards that raised
        self._failures = 0  # requests in a row that raised alone
        self._rows: Counter[ForwardMode] = Counter()
        self._read = ReadSum()
        self._guides = Guides(TokenGrammars(self._text_of_ids))

    # -- the loop ---------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """One round. With `overlap` it ends with a forward in flight, and what is reported is that of the one before.

        Raises EngineBroken when there is no going on.
        """
        if self.overlap:
            self._accept()
            self._launch()
        else:
            self._launch()
            self._accept()
        outputs = self.scheduler.settle()
        self._generated += sum(len(output.token_ids) for output in outputs)
        return outputs

    def _launch(self) -> None:
        """Start the next round. One without items has only endings to report, and is over at once."""
        assert self._flight is None
        work = self.scheduler.schedule()
        try:
            flight = self.parts.runner.launch(work)
        except Exception as error:
            self._undo(error)
            return
        if work.items:
            self._flight = flight
        else:
            self.scheduler.accept([])

    def _accept(self) -> None:
        """Take in the results of the round in flight, if there is one; if it raised, it is undone instead."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        try:
            results = flight.wait()
        except Exception as error:
            self._undo(error)
            return
        self.forwards += 1
        self._failures = 0
        for item in flight.work.items:
            self._rows[item.mode] += item.tokens.size
        self._read.add(result.cost for result in results if result.cost is not None)
        self.scheduler.accept(results)

    def _undo(self, error: Exception) -> None:
        """Leave it to the scheduler to find the request that raises; unless every request does."""
        logger.error("a forward raised", exc_info=error)
        self.undone += 1
        reason = f"{type(error).__name__}: {error}"
        suspects = self.scheduler.undo()
        if suspects and all(self.scheduler.is_live(rid) for rid in suspects):
            logger.warning("the requests of that forward are tried one by one: %s", ", ".join(suspects))
            return
        if not suspects and self._answers():  # its requests had all ended while it ran
            return
        self._failures += 1
        if not suspects or self._failures >= FAILURES_IN_A_ROW or not self._answers():
            raise EngineBroken(f"the engine failed: {reason}", suspects)
        logger.warning("request %s raised alone and has ended", suspects[0])

    def _answers(self) -> bool:
        """Whether a forward that touches nobody's pages and state, one masked block at position 0, succeeds."""
        mask, nobody = self.parts.model_config.mask_token_id, np.empty(0, dtype=np.int32)
        block = np.full(self.parts.model_config.block_length, mask, dtype=np.int64)
        none, first = block[:0], np.array([int(self.parts.runner.model.shifted_logits)])
        context = RowContext(SamplingParams(), 0, (), (), 0, nobody, nobody)
        probe = WorkItem(ForwardMode.SCORE, block, 0, none, candidates=first, target=0, context=context)
        try:
            self.parts.runner.run(Round((probe,), ()))
        except Exception:
            logger.exception("a forward of one masked block raised, too")
            return False
        return True

    def rest(self) -> None:
        """Call when no work is left: forgets method state of the last requests and asks, at most every 10 s, whether
        every page is in one hand. Raises EngineBroken if one is not."""
        if self.has_work():
            return
        self.parts.runner.release(self.scheduler.released())
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_INTERVAL_S
        try:
            self.parts.cache.check()
        except AssertionError as error:
            raise EngineBroken(f"the page pool is not in order: {error}") from error

    def has_work(self) -> bool:
        """True while a request is live, a forward in flight, or an ending not reported."""
        return self.scheduler.has_work or self._flight is not None

    @property
    def queued(self) -> int:
        """Requests that wait for their admission."""
        return len(self.scheduler.waiting)

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest naming the field, or QueueFull."""
        if self.scheduler.is_live(request.rid):
            raise InvalidRequest("rid", request.rid, "an id that no live request has")
        self._check_prompt(request)
        for token in request.logprob_ids:
            if not 0 <= token < self.parts.tokenizer.vocab_size:
                raise InvalidRequest("token_ids_logprob", token, f"0 to {self.parts.tokenizer.vocab_size - 1}")
        req = Req(request, self._settle(request), self._arrivals, self.parts.model_config.block_length)
        self.scheduler.add(req)
        self._arrivals += 1

    def abort(self, rid: str) -> bool:
        """End a live request; its last output comes from the next step. False if there is no such request."""
        return self.scheduler.abort(rid)

    def flush_cache(self) -> bool:
        """Drop all cached prefixes. False (and nothing done) while requests are live."""
        if self.has_work():
            return False
        self.parts.cache.flush()
        return True

    def _check_prompt(self, request: Request) -> None:
        limit = self.parts.context_length
        ids, wants = request.prompt_ids, request.sampling.max_new_tokens
        if not ids and wants != 0:
            raise InvalidRequest("prompt", "no tokens", "at least one token (an empty prompt has nothing to go on)")
        if len(ids) > limit or (len(ids) == limit and wants != 0):
            raise InvalidRequest("prompt", f"{len(ids)} tokens", f"fewer than the context length of {limit} tokens")
        if wants is not None and len(ids) + wants > limit:
            raise InvalidRequest(
                "sampling_params.max_new_tokens",
                wants,
                f"at most {limit - len(ids)} behind a prompt of {len(ids)} tokens (context length {limit})",
            )
        self._check_ids(ids)
        if request.score is not None and request.score.start > len(ids):
            raise InvalidRequest("logprob_start_len", request.score.start, f"at most the prompt's {len(ids)} tokens")

    def _check_ids(self, ids: tuple[int, ...]) -> None:
        try:
            tokens = np.asarray(ids, dtype=np.int64)
        except OverflowError:
            raise InvalidRequest("input_ids", "an integer of more than 64 bits", "token ids") from None
        size, mask = self.parts.tokenizer.vocab_size, self.parts.model_config.mask_token_id
        outside = np.flatnonzero((tokens < 0) | (tokens >= size) | (tokens == mask))
        if outside.size:
            at = int(outside[0])
            raise InvalidRequest(
                f"input_ids.{at}", ids[at], f"0 to {size - 1} without MASK ({mask}): no holes in a prompt"
            )

    def _settle(self, request: Request) -> ReqSettings:
        params, tokenizer = request.sampling, self.parts.tokenizer
        check_logit_bias(params, tokenizer.vocab_size)
        if params.n != 1:
            raise InvalidRequest(
                "sampling_params.n", params.n, "1 (an engine request is one sample; send more of them)"
            )
        for token in params.stop_token_ids:
            if not 0 <= token < tokenizer.vocab_size:
                raise InvalidRequest("sampling_params.stop_token_ids", token, f"0 to {tokenizer.vocab_size - 1}")
        most = self._room(request) if params.max_new_tokens is None else params.max_new_tokens
        eos = self.parts.eos_token_ids
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos)
        if len(ends | (eos if params.ignore_eos else frozenset())) + 1 >= tokenizer.vocab_size:
            raise InvalidRequest("sampling_params.stop_token_ids", "the whole vocabulary", "fewer tokens")
        sparse = resolve_sparse(params.custom_params, self.config, self.parts.geometry)
        decoding = resolve_decoding(params.custom_params, self.config, self.parts.model_config.block_length)
        guide = self._guides.make(params, ends, most, request.compiled)
        edits = load_algorithm(decoding.algorithm).edits and guide is None
        if edits and counts_tokens(params):
            allowed = "another one beside penalties: a token that may be replaced would count against itself"
            raise InvalidRequest("custom_params.algorithm", decoding.algorithm, allowed)
        return ReqSettings(
            seed=self._seed(request, params),
            limit=len(request.prompt_ids) + most,
            stop_ids=ends,
            ban_always=tuple(sorted(eos - frozenset(params.stop_token_ids))) if params.ignore_eos else (),
            ban_early=tuple(sorted(ends)) if params.min_new_tokens else (),
            sparse=sparse,
            decoding=decoding,
            text=TextStream(Detokenizer(tokenizer, params.skip_special_tokens), params.stop, params.no_stop_trim),
            guide=guide,
            edits=edits,
            origin=len(request.prompt_ids) % self.parts.model_config.block_length if self._moves else 0,
            scored_from=int(self.parts.runner.model.shifted_logits),
            sparse_from=self.parts.least_prefix.of(sparse, decoding),
            dense=self.parts.least_prefix.dense,
        )

    def _text_of_ids(self) -> list[bytes]:
        """What each id contributes to a text: nothing for special tokens and MASK."""
        tokenizer, mask = self.parts.tokenizer, self.parts.model_config.mask_token_id
        pieces = tokenizer.pieces(range(tokenizer.vocab_size))
        return [b"" if token == mask else piece for token, piece in enumerate(pieces)]

    def _room(self, request: Request) -> int:
        """Output tokens of a request that names no limit: what context and page pool leave."""
        pool = self.parts.cache.pool.num_pages * self.parts.cache.page_size
        room = max(0, min(self.parts.context_length, pool) - len(request.prompt_ids))
        params = request.sampling
        if params.max_new_tokens is None and params.min_new_tokens > room:
            raise InvalidRequest("sampling_params.min_new_tokens", params.min_new_tokens, f"at most {room}")
        return room

    def _seed(self, request: Request, params: SamplingParams) -> int:
        """The request's own seed, else one made of the engine's seed and the request's place in the order."""
        if params.sampling_seed is not None:
            return params.sampling_seed
        text = f"{self.config.random_seed}:{self._arrivals}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

    # -- facts ------------------------------------------------------------------------------------------------------

    def info(self) -> dict[str, object]:
        """What this engine is: JSON-able, fixed for its life."""
        return self.parts.info()

    def stats(self) -> dict[str, object]:
        """What this engine is doing: JSON-able counters."""
        cache, scheduler, graphs = self.parts.cache, self.scheduler, self.parts.runner.graphs
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "waiting_tokens": sum(req.prompt_len for req in scheduler.waiting),
            "pages_total": cache.pool.num_pages,
            "pages_free": cache.pool.free,
            "pages_cached": cache.tree.cached_pages,
            "pages_evictable": cache.tree.evictable_pages,
            "pages_owned": cache.owned_pages,
            "pages_evicted": cache.evicted_pages,
            "prompt_tokens": scheduler.prompt_tokens,
            "cached_tokens": scheduler.hit_tokens,
            "cache_hit_rate": scheduler.hit_tokens / max(1, scheduler.prompt_tokens),
            "requests": self._arrivals,
            "forwards": self.forwards,
            "undone_forwards": self.undone,
            "retractions": scheduler.retractions,
            "retracted": sum(req.cost.retractions > 0 for req in scheduler.waiting),
            "rows": {mode.value: self._rows[mode] for mode in ForwardMode},
            "dropped_results": scheduler.dropped,
            "recorded_graphs": 0 if graphs is None else len(graphs.recorded),
            "graph_forwards": 0 if graphs is None else graphs.runs,
            "generated_tokens": self._generated,
            "forward_s": self.parts.runner.forward_s,
            **self._guides.stats(),
            **self._read.stats(),
        }

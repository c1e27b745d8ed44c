"""What one round consists of, on the host: the scheduler writes it, the runner executes it. Knows no tensor library."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from losa_runtime.core.batch import ForwardMode, SparseParams
from losa_runtime.core.decoding_params import DecodingParams, Window
from losa_runtime.core.request import Alternatives
from losa_runtime.core.sampling_params import SamplingParams

Ids = NDArray[np.int64]


class Guide(Protocol):
    """What an output must match: made and understood by `grammar`; those between hand it on."""


class RowContext(NamedTuple):
    """What sampling needs to know of a request.

    seed: of its random numbers. ban_always: ids that are never chosen (EOS under ignore_eos). ban_early: ids that are
    not chosen at positions below `early_before` (min_new_tokens). prompt, output: token history for penalties; prompt
    holds its distinct ids, and none where no penalty looks at them; output
    holds finished blocks only, tokens accepted in the current block come on top. top_logprobs, logprob_ids: the
    alternatives that are to be reported, see Request. guide: of a request whose output must match a grammar.
    """

    sampling: SamplingParams
    seed: int
    ban_always: tuple[int, ...]
    ban_early: tuple[int, ...]
    early_before: int
    prompt: NDArray[np.int32]
    output: NDArray[np.int32]
    top_logprobs: int = 0
    logprob_ids: tuple[int, ...] = ()
    guide: Guide | None = None


class WorkItem(NamedTuple):
    """One segment of the coming forward.

    tokens: [n] as the model sees them (MASK where masked). start: position of the first, = committed tokens before it.
    pages: page table of the request, a view, covering what the segment reads and writes. For block segments:
    candidates: offsets that may be unmasked or, if the algorithm edits, replaced (for SCORE: the one scored offset);
    post_steps: steps of this block before this one that began without a mask; target: the scored token; unmasked:
    tokens accepted in this block before this step; window: of the candidates, the part that may be unmasked now, None
    for all. With shifted logits a store segment may have a candidate, too: the
    offset behind its rows, that is the next block's first; and a scored offset may lie there.
    """

    mode: ForwardMode
    tokens: Ids
    start: int
    pages: Ids
    slot: int = -1
    step: int = 0
    candidates: Ids | None = None
    known: int = 0
    target: int = -1
    sparse: SparseParams | None = None
    decoding: DecodingParams | None = None
    context: RowContext | None = None
    unmasked: int = 0
    post_steps: int = 0
    window: Window | None = None


class Round(NamedTuple):
    """The work of one forward: store segments first. released: slots whose method state dies before this round."""

    items: tuple[WorkItem, ...]
    released: tuple[int, ...]


class SegmentCost(NamedTuple):
    """What a denoising step read of its prefix. density_kv / density_q: share of prefix positions, mean over layers
    and heads, per KV head (after the union over the group) and per query head. active: per row, the share of layers
    in which it was recomputed. dense: the whole prefix was read for every row. kv_bytes: K/V read; metadata_bytes:
    summaries and keys read to choose them; dense_bytes: what dense attention reads."""

    density_kv: float
    density_q: float
    active: tuple[float, ...]
    dense: bool
    kv_bytes: int
    metadata_bytes: int
    dense_bytes: int


class BlockResult(NamedTuple):
    """The outcome of one segment. offsets: accepted candidates; tokens, logprobs: theirs; for SCORE: the score of the
    one candidate; empty for a store segment without a candidate. cost: of a denoising step, else None. error: why the
    segment has no usable result (logits, or K/V that were stored, are not numbers); offsets, tokens and logprobs are
    then empty. refused: the numbers are fine, but the request asks too much. alternatives: one beside each logprob,
    where the request wants them. finished: the block needs no further step; read where its algorithm edits."""

    offsets: Ids
    tokens: Ids
    logprobs: NDArray[np.float64]
    cost: SegmentCost | None = None
    error: str | None = None
    alternatives: tuple[Alternatives, ...] | None = None
    finished: bool = False
    refused: bool = False


def nothing(error: str | None = None, refused: bool = False) -> BlockResult:
    """The result of a segment that has brought no token."""
    none = np.empty(0, dtype=np.int64)
    return BlockResult(none, none, none.astype(np.float64), error=error, refused=refused)

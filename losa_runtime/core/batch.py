"""The rows of one forward pass, as every room below the scheduler sees them.

A *segment* is a run of consecutive positions of one request, a multiple of the block length long. Store segments
(PREFILL, COMMIT) write their K/V into pages and attend block-causally to the request's pages; block segments (OPEN,
DENOISE, SCORE) are one block each, write nothing, and attend to the committed prefix and to one another. Where blocks
are not counted from position 0, a store segment is one block, too, and a request's first block may be a shorter one.

Shape letters: T rows of the batch, S segments, P pages, B block length.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel

if TYPE_CHECKING:
    from torch import Tensor


class ForwardMode(Enum):
    PREFILL = "prefill"  # blocks of the prompt: store K/V, no logits
    COMMIT = "commit"  # a finished block: store K/V, no logits
    OPEN = "open"  # first denoising step of a block
    DENOISE = "denoise"  # a later denoising step
    SCORE = "score"  # one position of a scored block; no method state, always dense

    @property
    def stores(self) -> bool:
        """True where the rows' K/V go into pages."""
        return self in (ForwardMode.PREFILL, ForwardMode.COMMIT)


class ActiveRule(NamedTuple):
    """Which rows of a block are recomputed: the `value` most changed, that share of them, or a cumulative share."""

    kind: Literal["count", "ratio", "tau"]
    value: float


class SparseParams(NamedTuple):
    """A request's settled sparse parameters.

    token_budget: prefix tokens per query, a multiple of the page size. options: the method's own (its `Options`),
    frozen; requests with equal ones are computed together. planned_steps: denoising steps planned per block.
    """

    method: str
    token_budget: int
    active: ActiveRule
    options: BaseModel
    planned_steps: int


class Segment(NamedTuple):
    """Host-side view of one segment.

    rows: half-open range into the T rows. prefix_len: committed tokens before the first row, whole blocks.
    pages: int64 [P] page ids of the request in order, covering prefix_len (+ its own rows for a store segment).
    slot: index of per-request method state, -1 for store and SCORE segments. step: denoising step inside the block
    (0 = OPEN). sparse: None for store and SCORE segments. unmasked: tokens accepted in this block before this step.
    masked: offsets that may still be unmasked (None: not said, any of them).
    """

    mode: ForwardMode
    start: int
    stop: int
    prefix_len: int
    pages: Tensor
    slot: int = -1
    step: int = 0
    sparse: SparseParams | None = None
    unmasked: int = 0
    masked: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class ForwardBatch:
    """One forward. Store segments come first, so rows [0, stored) are stored and the rest are block rows.

    tokens_T, positions_T: int64 on the device. locations: int64 [stored], page * page_size + offset of each store row.
    """

    tokens_T: Tensor
    positions_T: Tensor
    segments: tuple[Segment, ...]
    locations: Tensor
    block_length: int

    @property
    def stored(self) -> int:
        """Number of leading rows whose K/V are written to pages."""
        return int(self.locations.shape[0])

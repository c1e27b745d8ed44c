"""What a request asks of the next forward, as work items. Decides nothing: what is due, and how much, is said.

Each is of one request, which has its lease, and names the pages of all tokens up to the end of what it reads or stores.
"""

from __future__ import annotations

import numpy as np

from losa_runtime.core.batch import ForwardMode
from losa_runtime.core.work import Ids, WorkItem
from losa_runtime.scheduler.block import DiffusionBlock
from losa_runtime.scheduler.req import Req


class WorkItems:
    """Writes them for a model with this block length and mask, over pages of this many tokens.

    shifted_logits: of the model; what stores the last known whole block then also asks for the token behind it.
    """

    def __init__(self, block_length: int, mask_token_id: int, page_size: int, shifted_logits: bool) -> None:
        self._block_length, self._mask, self._page_size = block_length, mask_token_id, page_size
        self._shifted = shifted_logits

    def prefill(self, req: Req, budget: int) -> list[WorkItem]:
        """The next whole blocks of the prompt, within `budget` tokens, as one segment; none if not even one fits.

        Blocks that are not counted from position 0 are a segment each.
        """
        size = min(req.prefill_target - req.committed, budget - budget % self._block_length)
        if size <= 0:
            return []
        if not req.origin:
            return [self._asking_on(req, self._stored(req, req.committed, req.committed + size))]
        items, start = [], req.committed
        while (stop := req.block_of(start).stop) <= req.committed + size:
            items.append(self._stored(req, start, stop))
            start = stop
        return items

    def _stored(self, req: Req, start: int, stop: int) -> WorkItem:
        tokens = req.tokens[start:stop].astype(np.int64)
        return WorkItem(ForwardMode.PREFILL, tokens, start, self._table(req, stop))

    def commit(self, req: Req, block: DiffusionBlock) -> WorkItem:
        """A finished block, to be stored."""
        table = self._table(req, block.start + block.tokens.size)
        return self._asking_on(req, WorkItem(ForwardMode.COMMIT, block.tokens.copy(), block.start, table))

    def _asking_on(self, req: Req, item: WorkItem) -> WorkItem:
        size = item.tokens.size
        if not self._shifted or item.start + size != req.length or req.length >= req.settings.limit:
            return item
        behind = np.array([size], dtype=np.int64)
        return item._replace(candidates=behind, known=size, decoding=req.settings.decoding, context=req.row_context())

    def block(self, req: Req, block: DiffusionBlock) -> WorkItem:
        """A step of an unfinished block."""
        return WorkItem(
            mode=ForwardMode.OPEN if block.step == 0 else ForwardMode.DENOISE,
            tokens=block.tokens.copy(),
            start=block.start,
            pages=self._table(req, block.start),
            slot=req.slot,
            step=block.step,
            candidates=block.candidates,
            known=block.known,
            sparse=req.settings.reading(block.start),
            decoding=req.settings.decoding,
            context=req.row_context(),
            unmasked=block.unmasked,
            post_steps=block.post_steps,
            window=req.settings.decoding.window(block.sub_block, block.sub_steps, self._block_length),
        )

    def scores(self, req: Req, count: int) -> list[WorkItem]:
        """One segment for each of the next `count` positions to be scored: its block, masked from there on."""
        items = []
        for position in req.unscored[:count]:
            block = req.block_of(position)
            if position == block.start and self._shifted:
                block = req.block_of(position - 1)  # its last row speaks for it
            start, offset = block.start, position - block.start
            tokens = np.full(len(block), self._mask, dtype=np.int64)
            tokens[:offset] = req.tokens[start:position]
            items.append(
                WorkItem(
                    mode=ForwardMode.SCORE,
                    tokens=tokens,
                    start=start,
                    pages=self._table(req, start),
                    candidates=np.array([offset], dtype=np.int64),
                    target=int(req.tokens[position]),
                    context=req.row_context(),
                )
            )
        return items

    def _table(self, req: Req, tokens: int) -> Ids:
        assert req.lease is not None
        return req.lease.pages[: -(-tokens // self._page_size)]

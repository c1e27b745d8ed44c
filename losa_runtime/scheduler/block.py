"""A diffusion block in the making: which of its positions are known. Knows no request and no cache."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from losa_runtime.core.request import Alternatives
from losa_runtime.core.work import Ids


class FirstToken(NamedTuple):
    """What the last row of a stored block has brought, with shifted logits: the next block's first token."""

    token: int
    logprob: float
    alternatives: Alternatives | None


class DiffusionBlock:
    """B positions from `start` on: `known` given tokens (the tail of a prompt), then masks that become tokens.

    foretold: with shifted logits, the token of offset 0 comes from the block before, ahead of the first step.
    edits: tokens that were accepted may be replaced until the block is said to be finished.
    sub_block_length: of the parts that are filled from left to right; None for one part.
    limit: offsets at or behind it are never unmasked (no work past max_new_tokens); they stay MASK to the end, so a
    block whose limit is below B is the request's last and its K/V is never stored.
    """

    __slots__ = (
        *("alternatives", "edits", "finished", "foretold", "known", "latest", "limit"),
        *("logprobs", "masked", "post_steps", "start", "step", "sub_block_length", "sub_steps", "tokens"),
    )

    def __init__(
        self,
        start: int,
        known: Ids,
        limit: int,
        block_length: int,
        mask_token_id: int,
        edits: bool = False,
        sub_block_length: int | None = None,
    ) -> None:
        assert known.size < block_length and known.size < limit <= block_length
        self.start, self.known, self.limit = start, int(known.size), limit
        self.tokens: Ids = np.full(block_length, mask_token_id, dtype=np.int64)
        self.tokens[: known.size] = known
        self.masked = np.ones(block_length, dtype=bool)
        self.masked[: known.size] = False
        self.logprobs: NDArray[np.float64] = np.zeros(block_length)
        self.alternatives: dict[int, Alternatives] = {}  # by offset, for a request that wants them
        self.step = 0
        self.foretold = self.finished = False
        self.edits, self.post_steps = edits, 0
        self.sub_block_length = sub_block_length or block_length
        self.sub_steps = 0  # that the open sub-block has taken
        self.latest: tuple[int, ...] = ()  # offsets accepted in the last step

    @property
    def candidates(self) -> Ids:
        """Offsets that may be unmasked or edited in the next step, ascending."""
        if self.edits:
            return np.arange(self._given, self.limit)
        return self.masked[: self.limit].nonzero()[0]

    @property
    def sub_block(self) -> int:
        """Number of the open sub-block: the leftmost that has masks; where none has, the one behind the last."""
        if self.sub_block_length == self.tokens.size:
            return 0  # the block itself, open or not
        masked = self.masked[: self.limit].nonzero()[0]
        return (int(masked[0]) if masked.size else self.tokens.size) // self.sub_block_length

    @property
    def unmasked(self) -> int:
        """Tokens accepted so far; known ones do not count."""
        return self.limit - self.known - int(self.masked[: self.limit].sum())

    @property
    def settled(self) -> int:
        """Length of the leading run of tokens that can no longer change."""
        if self.edits and not self.complete:
            return self._given
        masked = self.masked.nonzero()[0]
        return int(masked[0]) if masked.size else self.masked.size

    @property
    def complete(self) -> bool:
        """True when every position up to the limit has its token for good."""
        left = self.masked[: self.limit].any()
        return not left and (self.finished or not self.edits or self._given == self.limit)

    @property
    def _given(self) -> int:
        """Length of the leading run of tokens that no step has brought."""
        return max(self.known, int(self.foretold))

    def accept(self, offsets: Ids, tokens: Ids, logprobs: NDArray[np.float64], finished: bool = False) -> None:
        """Unmask `offsets` with `tokens`, or edit them; each must be a candidate. Ends the step."""
        assert self.edits or self.masked[offsets].all()
        assert (offsets >= self._given).all() and (offsets < self.limit).all()
        self.post_steps += not self.masked[: self.limit].any()
        self.finished = finished
        was_open = self.sub_block
        self.tokens[offsets], self.logprobs[offsets] = tokens, logprobs
        self.masked[offsets] = False
        self.sub_steps = self.sub_steps + 1 if self.sub_block == was_open else 0
        self.latest = tuple(offsets.tolist())
        self.step += 1

    def foretell(self, first: FirstToken) -> None:
        """Put the token that the block before has brought at offset 0. No step of this block."""
        assert self.known == 0 and self.step == 0
        self.tokens[0], self.logprobs[0], self.masked[0] = first.token, first.logprob, False
        if first.alternatives is not None:
            self.alternatives[0] = first.alternatives
        self.foretold = True

    def first_stop(self, stop_ids: frozenset[int]) -> int | None:
        """Offset of the first generated stop token with nothing masked before it, if there is one."""
        for offset in range(self.known, min(self.settled, self.limit)):
            if int(self.tokens[offset]) in stop_ids:
                return offset
        return None

"""A request's settled decoding parameters."""

from __future__ import annotations

from typing import NamedTuple


class Window(NamedTuple):
    """The open sub-block of a step: only masks at offsets below `stop` may become tokens.

    The algorithm sees it as a block of its own: of `length` positions and with `num_steps` planned steps, `step` of
    which it has taken.
    """

    stop: int
    length: int
    num_steps: int
    step: int


class DecodingParams(NamedTuple):
    """algorithm: registry name. threshold: confidence above which the dynamic rule accepts. num_steps: planned
    denoising steps per block, 1 .. block length. entropy_bound: nats that the entropy-bounded rule accepts together.
    edit_threshold, post_edit_steps, neighbour_penalty: of the rule that edits. sub_block_length: positions that are
    finished from left to right before the next ones are begun, None for the whole block; it divides the block length,
    and num_steps are enough for one step in each sub-block."""

    algorithm: str
    threshold: float
    num_steps: int
    entropy_bound: float = 0.1
    edit_threshold: float = 0.9
    post_edit_steps: int = 16
    neighbour_penalty: float = 0.0
    sub_block_length: int | None = None

    def window(self, number: int, step: int, block_length: int) -> Window | None:
        """Of sub-block `number` when it has taken `step` steps; None without sub-blocks.

        The block's planned steps are shared by its sub-blocks as evenly as can be, the earlier ones taking more: a
        block is done within its planned steps with sub-blocks, too.
        """
        length = self.sub_block_length
        if length is None:
            return None
        planned, more = divmod(self.num_steps, block_length // length)
        return Window((number + 1) * length, length, planned + (number < more), step)
